"""The linter finds planted defects, each where it is, and is silent about what is right."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from tensorsleuth.cli.app import main
from tensorsleuth.porting.environment import find_environment
from tensorsleuth.porting.lint.api import Entry, known_releases, load_release
from tensorsleuth.porting.lint.extract import extract_module
from tensorsleuth.porting.lint.linter import all_rules, lint
from tensorsleuth.porting.lint.signatures import CallShape, of_text, override_problem
from tensorsleuth.store.errors import InputError

CASES = Path(__file__).parent / "lint_cases"
DOCUMENT = Path(__file__).parents[1] / "docs" / "port-lint.md"
DEFECTS = sorted(path for path in CASES.glob("*.py") if path.stem != "clean")
_EXPECTED = re.compile(r"# <- ([\w-]+)")
#: What NxD Inference's own models break at SDK 2.29, each checked by hand: two reads of attributes that no NeuronConfig
#: has, on paths that raise; text models that replace forward; windows of vision-language models that no mask knows of,
#: and their conversions without rank numbers.
KNOWN = {
    ("llama4/modeling_llama4.py", "unknown-config-attribute"),
    ("mllama/modeling_mllama.py", "forward-override"),
    ("qwen2_vl/modeling_qwen2_vl_text.py", "sliding-window-unset"),
    ("qwen2_vl/modeling_qwen2_vl_text.py", "missing-rank"),
    ("qwen3_vl/modeling_qwen3_vl_text.py", "sliding-window-unset"),
    ("qwen3_vl/modeling_qwen3_vl_text.py", "missing-rank"),
}
needs_sources = pytest.mark.skipif(
    find_environment().nxdi is None or find_environment().nxd is None,
    reason="needs the sources of NxD and NxD Inference: set NXDI_SRC and NXD_SRC",
)


def found(path: Path, release: str = "2.28") -> list[tuple[int, str]]:
    return [(item.line, item.rule) for item in lint(path, release).diagnostics if item.severity != "note"]


@pytest.mark.parametrize("path", DEFECTS, ids=lambda path: path.stem)
def test_a_planted_defect_is_found_where_it_is_and_nothing_else(path: Path) -> None:
    text = path.read_text()
    lines, release = text.splitlines(), re.search(r"sdk: ([\d.]+)", text)
    expected = [(number, rule) for number, line in enumerate(lines, 1) for rule in _EXPECTED.findall(line)]
    assert len(expected) == 1
    assert found(path, release[1] if release else "2.28") == expected


@pytest.mark.parametrize("release", known_releases())
def test_a_correct_port_has_no_diagnostic_in_any_release(release: str) -> None:
    assert lint(CASES / "clean.py", release).diagnostics == ()


@needs_sources
def test_the_librarys_own_models_give_no_false_alarm() -> None:
    package = find_environment().nxdi
    assert package is not None
    if package.version != "0.9.0":
        pytest.skip(f"the sources are NxD Inference {package.version}; SDK 2.29 has 0.9.0")
    models = package.folder / "models"
    files = sorted(models.glob("**/modeling_*.py"))
    alarms = {
        (file.relative_to(models).as_posix(), item.rule)
        for file in files
        for item in lint(file, "2.29").diagnostics
        if item.severity != "note"
    }
    assert len(files) > 20
    assert alarms == KNOWN


def test_every_rule_is_documented_and_has_a_planted_defect() -> None:
    text = DOCUMENT.read_text()
    undocumented = [rule for rule in all_rules() if f"| `{rule}` |" not in text]
    documented = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    planted = {rule for path in DEFECTS for rule in _EXPECTED.findall(path.read_text())}
    file_rules = {rule.id for rule in all_rules().values() if rule.check is not None and rule.severity != "note"}
    assert undocumented == []
    assert [rule for rule in documented if rule not in all_rules()] == []
    assert file_rules - planted == set()


def test_a_comment_on_the_line_silences_one_rule(tmp_path: Path) -> None:
    text = (CASES / "unknown_module.py").read_text()
    port = tmp_path / "modeling_port.py"
    port.write_text(text.replace("# <- unknown-module", "# sleuth: ignore[unknown-module]"))
    assert found(port) == []
    port.write_text(text.replace("# <- unknown-module", "# sleuth: ignore[unknown-name]"))
    assert [rule for _, rule in found(port)] == ["unknown-module"]


def test_an_optional_import_may_be_missing(tmp_path: Path) -> None:
    port = tmp_path / "modeling_port.py"
    port.write_text(
        "try:\n    from neuronx_distributed_inference.modules.nowhere import Thing\n"
        "except ImportError:\n    Thing = None\n"
    )
    assert found(port) == []


def test_names_are_followed_into_the_ports_other_files(tmp_path: Path) -> None:
    (tmp_path / "configuration_port.py").write_text(
        "from neuronx_distributed_inference.models.config import NeuronConfig\n\n\n"
        "class PortNeuronConfig(NeuronConfig):\n    def __init__(self, **kwargs):\n"
        "        self.router_scale = kwargs.pop('router_scale', 1.0)\n        super().__init__(**kwargs)\n"
    )
    (tmp_path / "modeling_port.py").write_text(
        "from .configuration_port import PortNeuronConfig\n\n"
        "config = PortNeuronConfig(tp_degree=2, router_scale=2.0, rooter_scale=3.0)\n"
        "scale = config.neuron_config.router_scale\n"
    )
    diagnostics = lint(tmp_path, "2.28").diagnostics
    assert [(item.line, item.rule) for item in diagnostics] == [(3, "unknown-config-key")]
    assert "rooter_scale" in diagnostics[0].message


def test_the_exit_code_is_1_with_errors_0_without_and_2_for_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["port", "lint", str(CASES / "clean.py")]) == 0
    assert main(["port", "lint", str(CASES / "missing_rank.py")]) == 0  # a warning
    assert main(["port", "lint", str(CASES / "unknown_name.py"), "--json"]) == 1
    capsys.readouterr()
    assert main(["port", "lint", str(CASES / "unknown_name.py"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (item,) = report["diagnostics"]
    assert report["verdict"] == "fail"
    assert (item["rule"], item["line"], item["column"], item["severity"]) == ("unknown-name", 3, 1, "error")
    assert "neuronx_distributed_inference.models.llama.modeling_llama" in item["fix"]
    for arguments in (
        ["missing.py"],
        [str(CASES / "clean.py"), "--sdk", "1.0"],
        [str(CASES / "clean.py"), "--ignore", "no-such-rule"],
        [str(tmp_path)],
        [],
    ):
        assert main(["port", "lint", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_linting_imports_neither_torch_nor_the_library() -> None:
    script = (
        "import sys; from tensorsleuth.porting.lint.linter import lint; "
        f"lint({str(CASES / 'clean.py')!r}, '2.29'); "
        "print([m for m in ('torch', 'transformers', 'neuronx_distributed', 'torch_neuronx') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_release_knows_what_its_modules_define_and_import() -> None:
    old, new = load_release("2.28"), load_release("2.29")
    base = Entry("class", "neuronx_distributed_inference.modules.attention.attention_base", "NeuronAttentionBase")
    assert new.find(base.module, base.name) == base
    assert old.find("neuronx_distributed.parallel_layers", "parallel_state") == Entry(
        "module", "neuronx_distributed.parallel_layers.parallel_state"
    )
    first, second = (release.method(base, "__init__") for release in (old, new))
    assert first is not None
    assert second is not None
    assert "softmax_scale" not in first[1].names
    assert "softmax_scale" in second[1].names


def test_the_table_says_what_a_source_file_says() -> None:
    facts = extract_module(
        "from .other import A as B\nclass C(B):\n    limit = 3\n    def __init__(self, a, *, b=1, **kwargs):\n"
        "        self.d = kwargs.pop('d', 2)\n        self.hook(a, n=b)\n"
        "    @staticmethod\n    def hook(x: int, n=0) -> int:\n        raise NotImplementedError('later')\n",
        "package.module",
    )
    assert facts["imports"] == {"B": "package.other:A"}
    assert facts["classes"]["C"] == {
        "bases": ["B"],
        "methods": {"__init__": "(self, a, *, b=1, **kwargs)", "hook": "@staticmethod (x, n=0)"},
        "attributes": ["d", "limit"],
        "kwargs": ["d"],
        "abstract": ["hook"],
        "calls": {"hook": [[1, ["n"], ["__init__"]]]},
    }


@pytest.mark.parametrize(
    ("function", "positional", "named", "problem"),
    [
        (lambda a, b=1: None, 1, (), None),
        (lambda a, b=1: None, 3, (), "takes 2 positional arguments, is given 3"),
        (lambda a, b=1: None, 0, ("b",), "argument 'a' is missing"),
        (lambda a, *, b: None, 1, ("b",), None),
        (lambda a, *, b: None, 1, ("c",), "unknown argument 'c'"),
        (lambda a, **rest: None, 1, ("c",), None),
        (lambda a, b, /: None, 1, ("b",), "unknown argument 'b'"),
    ],
)
def test_a_call_fits_a_signature_as_python_says(
    function: Callable[..., None], positional: int, named: tuple[str, ...], problem: str | None
) -> None:
    call = ", ".join([*["0"] * positional, *(f"{name}=0" for name in named)])
    node = ast.parse(f"f({call})", mode="eval").body
    assert isinstance(node, ast.Call)
    signature = of_text(str(inspect.signature(function)), method=False)
    assert signature.problem(CallShape.of(node)) == problem
    with nullcontext() if problem is None else pytest.raises(TypeError):  # the interpreter is the oracle
        function(*[0] * positional, **dict.fromkeys(named, 0))


def test_a_call_that_unpacks_may_fit_any_signature() -> None:
    node = ast.parse("f(*x)", mode="eval").body
    assert isinstance(node, ast.Call)
    assert of_text("(a, b)", method=False).problem(CallShape.of(node)) is None


def test_an_override_may_widen_but_not_narrow() -> None:
    base = of_text("(self, x, mask=None)", method=True)
    calls = [CallShape(1, ("mask",))]
    assert override_problem(of_text("(self, x, mask=None, more=1)", method=True), base, calls) is None
    assert override_problem(of_text("(self, *args, **kwargs)", method=True), base, calls) is None
    assert "mask" in str(override_problem(of_text("(self, x)", method=True), base, calls))
    static = of_text("@staticmethod (x, mask=None)", method=True)
    assert "is an instance method, where the base class has a static" in str(override_problem(base, static, calls))


@needs_sources
def test_a_conversion_that_loses_doubles_and_misshapes_weights_is_told(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
from tensorsleuth.porting.lint.coverage import check_coverage
folder = Path(sys.argv[1])
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model", max_shard_size="100KB")
own = "neuronx_distributed_inference.models.llama.modeling_llama:NeuronLlamaForCausalLM"
for port in (own, str(folder / "modeling_port.py") + ":Port"):
    for problem in check_coverage(port, folder / "model"):
        print(port[-4:], problem.rule, problem.message)
"""
    (tmp_path / "modeling_port.py").write_text(
        "import torch\n"
        "from neuronx_distributed_inference.models.llama.modeling_llama import NeuronLlamaForCausalLM\n\n\n"
        "class Port(NeuronLlamaForCausalLM):\n    @staticmethod\n"
        "    def convert_hf_to_neuron_state_dict(state_dict, config):\n"
        "        for i in range(config.num_hidden_layers):\n"
        "            gate = state_dict[f'layers.{i}.mlp.gate_proj.weight']\n"
        "            state_dict[f'layers.{i}.mlp.up_proj.weight'] = gate.clone()\n"
        "        state_dict['norm.weight'] = torch.cat([state_dict['norm.weight']] * 2)\n"
        "        state_dict['layers.1.post_norm.weight'] = state_dict.pop('layers.1.post_attention_layernorm.weight')\n"
        "        return state_dict\n"
    )
    (script := tmp_path / "script.py").write_text(code)
    shown = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert shown.returncode == 0, shown.stderr
    assert [line.split(" fills")[0].split(" is ")[0] for line in shown.stdout.splitlines()] == [
        "Port unfilled-parameter layers.*.post_attention_layernorm.weight (1 tensor)",
        "Port unconsumed-key checkpoint key model.layers.*.mlp.up_proj.weight (2 tensors)",
        "Port unconsumed-key checkpoint key model.layers.*.post_attention_layernorm.weight (1 tensor)",
        "Port weight-shape norm.weight (1 tensor) gets [128], its parameter",
        "Port key-used-twice checkpoint key model.layers.*.mlp.gate_proj.weight (2 tensors)",
    ]


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no safetensors files"):
        lint(CASES / "clean.py", "2.28", checkpoint=tmp_path)
