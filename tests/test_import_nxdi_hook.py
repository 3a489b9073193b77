"""The files that NxD Inference's own hook writes import like the ones that the other tests write for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_dumps import MODULES, PAD, hidden_states, write_tokens
from tensorsleuth.capture.importers import ImportOptions, import_dump
from tensorsleuth.capture.pending import to_numpy
from tensorsleuth.store import Trace

SOURCES = [os.environ.get(name, "") for name in ("NXDI_SRC", "NXD_SRC")]
pytestmark = pytest.mark.skipif(
    not all(SOURCES), reason="needs NxD Inference's sources: set NXDI_SRC and NXD_SRC to the folders of its packages"
)

PROMPTS, FED = [[3, 4, 5, 6, 7], [8, 9, 10]], [[11, 12], [14, 15]]
#: Hands every forward pass's tensors to the hook, as the application does.
DRIVE = """
import sys
from types import SimpleNamespace
import torch
from tensorsleuth.capture.nxdi import stand_in
sys.path[:0] = sys.argv[3:]
stand_in.install()
from neuronx_distributed_inference.utils.tensor_capture_utils import get_tensor_capture_hook

modules, passes = torch.load(sys.argv[1], weights_only=True)
config = SimpleNamespace(modules_to_capture=modules, capture_inputs=False)
application = SimpleNamespace(neuron_config=SimpleNamespace(tensor_capture_config=config))
hook = get_tensor_capture_hook(tensor_capture_save_dir=sys.argv[2])
for captured in passes:
    hook(application, captured)
"""


def passes() -> list[list[torch.Tensor]]:
    """Every forward pass of both prompts: a module that recorded nothing, and an unused slot for manual tensors."""
    found = []
    for prompt, fed in zip(PROMPTS, FED, strict=True):
        padded = [*prompt, *[PAD] * (8 - len(prompt))]
        steps = [(padded, 0), *(([token], len(prompt) + index) for index, token in enumerate(fed))]
        for tokens, start in steps:
            captured = [hidden_states(module, tokens, start) for module in MODULES]
            last = len(prompt) - 1 if start == 0 else 0
            captured[-1] = captured[-1][:, last : last + 1]
            nothing = torch.zeros(1, dtype=torch.bfloat16)
            found.append([*captured, nothing, torch.full((1,), float("nan"), dtype=torch.bfloat16)])
    return found


def test_the_hooks_own_files_import(trace: Trace, tmp_path: Path, read: Any) -> None:
    torch.save([[*MODULES, "layers.1"], passes()], tmp_path / "passes.pt")
    command = [sys.executable, "-c", DRIVE, str(tmp_path / "passes.pt"), str(tmp_path / "dump"), *SOURCES]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    tokens = write_tokens(
        tmp_path / "t.jsonl",
        [{"token_ids": p + f, "n_prompt": len(p)} for p, f in zip(PROMPTS, FED, strict=True)],
    )
    options = ImportOptions(tokens=tokens)
    summary = import_dump(trace, tmp_path / "dump", run="t", role="target", options=options)
    assert (summary.format, summary.n_tensors, summary.positions) == ("nxdi", 30, 30)
    assert len(summary.skipped) == 6
    assert all("layers.1 recorded nothing" in reason for reason in summary.skipped.values())
    for stored in read(trace):
        row, prompt = stored.row, PROMPTS[stored.row["prompt"]]
        step = row["step"]
        ids = prompt if step == 0 else [FED[row["prompt"]][step - 1]]
        wanted = to_numpy(hidden_states(row["module"], ids, 0 if step == 0 else len(prompt) + step - 1))
        wanted = wanted[:, -1:] if row["module"] == "lm_head" else wanted
        np.testing.assert_array_equal(stored.values.view(np.uint16), wanted.view(np.uint16))
