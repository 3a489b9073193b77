"""Recording the logits of a compiled port: every graph returns them, whatever was compiled in beside.

None of this has run on a device; with the same application on a CPU, the tests run it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...capture.generate import CausalModel
from ...capture.hf import ModelSource, checkpoint_fingerprint, load_config, quiet_transformers, stop_tokens
from ...capture.hf_run import HuggingFaceCapture, prepare_prompts, run_recorded, selection_facts
from ...capture.nxdi.run import NxdiCapture
from ...capture.selection import Selection
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from .session import DevicePort


class LogitsOnly(torch.nn.Module):
    """A model whose only visible module is `lm_head`: what it returns are the logits of another."""

    def __init__(self, model: CausalModel) -> None:
        """`model` computes the logits."""
        super().__init__()
        self.lm_head = torch.nn.Identity()
        self._model = model

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, Any]:
        """See `capture.generate.CausalModel`."""
        logits, cache = self._model(*arguments)
        return self.lm_head(logits), cache


def capture_device_logits(
    trace: Trace, capture: NxdiCapture, compiled: Path, *, progress: Progress = no_progress
) -> None:
    """Run a compiled port over prompts and record its logits as site `lm_head`.

    Args:
        trace: the trace that receives the run.
        capture: what to do; its selection is not used.
        compiled: folder that the port was compiled into.
        progress: called with a stage, steps done and steps in all.

    Raises:
        InputError: there is no Neuron SDK or device.
    """
    quiet_transformers()
    device = DevicePort(capture.port, compiled)
    record_logits(trace, capture, device.model, str(compiled), device.application.neuron_config, progress=progress)


def record_logits(
    trace: Trace,
    capture: NxdiCapture,
    model: CausalModel,
    compiled: str,
    neuron_config: Any,
    *,
    progress: Progress = no_progress,
) -> None:
    """Record the logits of a loaded port; see `capture_device_logits`."""
    source = ModelSource(capture.model)
    config = load_config(source)
    request = HuggingFaceCapture(
        source, capture.run, capture.role, capture.dtype, capture.prompts, capture.teacher, capture.generation
    )
    prompts = prepare_prompts(trace, request, config)
    generation = replace(capture.generation, stop_tokens=stop_tokens(config), padding="right")
    selection = Selection(include=("lm_head",))
    wrapped = LogitsOnly(model)
    run_recorded(
        trace,
        wrapped,
        wrapped,
        prompts,
        generation,
        run=capture.run,
        role=capture.role,
        stack="nxdi",
        model_name=str(capture.model),
        selection=selection,
        facts={
            "checkpoint_fingerprint": checkpoint_fingerprint(source),
            "teacher": capture.teacher,
            "port": capture.port,
            "compiled": compiled,
            "model_dtype": str(neuron_config.torch_dtype).removeprefix("torch."),
            "selection": selection_facts(selection),
        },
        progress=progress,
    )
