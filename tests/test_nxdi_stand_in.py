"""The stand-in supplies what the sources import, and refuses everything else by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tensorsleuth.capture.nxdi import stand_in
from tensorsleuth.capture.nxdi.stand_in_names import NEURON_MODULES, PUBLIC_MODULES


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own: the stand-in changes what can be imported."""
    environment = {**{k: v for k, v in os.environ.items() if k not in ("NXDI_SRC", "NXD_SRC")}, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


INSTALL = "from tensorsleuth.capture.nxdi import stand_in; stand_in.install()\n"


def test_every_listed_name_can_be_imported_and_no_other() -> None:
    lines = [INSTALL]
    for module, names in {**NEURON_MODULES, **PUBLIC_MODULES}.items():
        lines.append(f"import {module}")
        lines += [f"from {module} import {name}" for name in names]
    lines += [
        "absent = ('import torch_xla.nothing', 'from torch_xla.runtime import world_size', 'import nki.simulate')",
        "for statement in absent:",
        "    try:",
        "        exec(statement)",
        "    except ImportError as error:",
        "        print(error)",
    ]
    done = run("\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3
    assert "torch_xla.nothing" in done.stdout


USES = {
    "torch_neuronx.xla_impl.ops.TopK": "from torch_neuronx.xla_impl.ops import TopK; TopK(1)",
    "nkilib.core.mlp.mlp.mlp": "from nkilib.core.mlp.mlp import mlp; mlp[1, 2]",
    "torch_xla.core.xla_model.mark_step": "import torch_xla.core.xla_model as xm; xm.mark_step()",
    "torch_neuronx.pyhlo.hlo_pb2.Module": "from torch_neuronx.pyhlo import hlo_pb2; hlo_pb2.Module()",
    "forbidden_kernel": "import nki\n@nki.jit\ndef forbidden_kernel(x): ...\nforbidden_kernel(1)",
    "print": "from torch_neuronx.xla_impl.base import xla_hlo_call\nxla_hlo_call(print)(1)",
}


def test_a_neuron_only_name_that_is_used_says_which() -> None:
    done = run(
        INSTALL
        + f"""
for name, use in {USES!r}.items():
    try:
        exec(use)
        print("no error for", name)
    except NotImplementedError as error:
        assert name in str(error) and "stand-in" in str(error), (name, error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_names_with_behaviour_behave() -> None:
    done = run(
        INSTALL
        + """
import torch, tenacity
from torch_xla.core.xla_model import REDUCE_SUM, REDUCE_MAX, REDUCE_MIN
from torch_neuronx.utils import get_platform_target
from neuronxcc.nki._pre_prod_kernels.collectives import CollectivesConfig
from nkilib.core.moe.moe_cte.moe_cte_utils import SkipMode
assert len({REDUCE_SUM: 1, REDUCE_MAX: 2, REDUCE_MIN: 3}) == 3
assert get_platform_target() == "trn2"
assert CollectivesConfig(replica_groups=[[0, 1]]).rank_src_tgt_pairs[1] is not None
assert SkipMode(True, False)
assert torch.classes.neuron.SPMDModel
@tenacity.retry(stop=tenacity.stop_after_attempt(3))
def f(): return 5
assert f() == 5
"""
    )
    assert done.returncode == 0, done.stderr


def test_a_real_sdk_is_never_covered(tmp_path: Path) -> None:
    package = tmp_path / "torch_neuronx"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    (package / "core.py").write_text("")
    done = run(INSTALL, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "torch_neuronx is installed" in done.stderr


def test_a_real_public_package_wins(tmp_path: Path) -> None:
    (tmp_path / "boto3").mkdir()
    (tmp_path / "boto3" / "__init__.py").write_text("real = True\n")
    done = run(
        INSTALL + "import boto3, botocore; assert boto3.real and not hasattr(botocore, 'real')",
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr


def test_transformers_never_sees_it_and_it_can_be_taken_out() -> None:
    done = run(
        INSTALL
        + """
import sys, torch_xla, nki
from transformers.utils import is_torch_xla_available
assert not is_torch_xla_available()
assert stand_in.install() is stand_in.installed()
stand_in.uninstall()
assert "nki" not in sys.modules
import nki
"""
    )
    assert "ModuleNotFoundError: No module named 'nki'" in done.stderr


def test_nothing_is_installed_by_importing_the_package() -> None:
    assert stand_in.installed() is None
