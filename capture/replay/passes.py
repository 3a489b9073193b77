"""Running a model's modules on given values, prompt by prompt: one replay, recorded as a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...store.manifest import Prompt, PromptTokens, RunManifest
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..hf import HuggingFaceCausalModel
from ..layout import Row, StepLayout
from ..recorder import record
from .recorder import Replaying, ReplayRecorder


@dataclass(frozen=True)
class ReplayedPrompt:
    """A prompt as another run computed it.

    Attributes:
        prompt: its index in that run.
        token_ids: the tokens that were fed.
        n_prefill: how many of them in the first step.
    """

    prompt: int
    token_ids: tuple[int, ...]
    n_prefill: int

    @property
    def layout(self) -> StepLayout:
        """All positions in one pass."""
        return _layout(self, "prefill", 0, 0, len(self.token_ids))

    @property
    def steps(self) -> list[StepLayout]:
        """The steps of the other run as parts of that pass."""
        n = len(self.token_ids)
        decode = [_layout(self, "decode", p - self.n_prefill + 1, p, 1) for p in range(self.n_prefill, n)]
        return [_layout(self, "prefill", 0, 0, min(self.n_prefill, n)), *decode]


def _layout(prompt: ReplayedPrompt, phase: str, step: int, start: int, count: int) -> StepLayout:
    return StepLayout(phase, step, 1, len(prompt.token_ids), (Row(0, prompt.prompt, start, count, start),))


def prompts_of(trace: Trace, manifest: RunManifest) -> list[ReplayedPrompt]:
    """The prompts of a run with the tokens that it computed; the last token it chose is not one of them."""
    statement = "SELECT prompt, max(position_start + position_count) AS n FROM tensors WHERE run = ? GROUP BY ALL"
    computed = {row["prompt"]: row["n"] for row in trace.query(statement, [manifest.run]).to_pylist()}
    lengths = {prompt.prompt: prompt.n_tokens for prompt in manifest.prompts}
    return [
        ReplayedPrompt(
            item.prompt, item.token_ids[: computed[item.prompt]], lengths.get(item.prompt, computed[item.prompt])
        )
        for item in manifest.tokens
        if computed.get(item.prompt)
    ]


def replay_run(
    trace: Trace,
    model: torch.nn.Module,
    prompts: Sequence[ReplayedPrompt],
    replaying: Replaying,
    *,
    run: str,
    role: str,
    model_name: str,
    source: RunManifest,
    facts: dict[str, Any],
    progress: Progress = no_progress,
) -> None:
    """Replay a model's modules over prompts and record it as a run.

    Args:
        trace: where values come from and where the run goes.
        model: the model, in the dtype of the replay.
        prompts: prompts of the run whose values are given.
        replaying: values, wanted sites; receives what each module was replayed on.
        run: name of the new run.
        role: its role.
        model_name: what the user calls the model.
        source: the run whose values are given; prompts and tokens are its own.
        facts: further provenance.
        progress: called before every prompt.
    """
    kept = {prompt.prompt for prompt in prompts}
    listing: list[Prompt] = [prompt for prompt in source.prompts if prompt.prompt in kept]
    tokens: list[PromptTokens] = [replace(item) for item in source.tokens if item.prompt in kept]
    with (
        torch.no_grad(),
        record(
            trace,
            model,
            run=run,
            role=role,
            stack="hf",
            model_name=model_name,
            prompts=listing,
            tokens=lambda: tokens,
            provenance=facts,
            recorder_type=partial(ReplayRecorder, replaying=replaying),
        ) as recorder,
    ):
        assert isinstance(recorder, ReplayRecorder)
        for number, prompt in enumerate(prompts):
            progress(f"replay {run}", number, len(prompts))
            run_prompt(model, recorder, prompt)
            recorder.flush()
            trace.release_pages()


def run_prompt(model: torch.nn.Module, recorder: ReplayRecorder, prompt: ReplayedPrompt) -> None:
    """One forward pass over all positions of a prompt: causality makes decoded positions what they were."""
    ids = torch.tensor([prompt.token_ids])
    positions = torch.arange(ids.shape[1])[None]
    with recorder.replay(prompt.layout, prompt.steps):
        HuggingFaceCausalModel(model)(ids, torch.ones_like(ids), positions, None, use_cache=False)
