"""Reasons not to trust a comparison whatever its numbers say."""

from __future__ import annotations

from collections.abc import Sequence

from ..store.manifest import RunManifest
from ..store.trace import Trace
from .align import PromptPair


def doubts_about(
    trace: Trace, reference: str, baseline: str | None, target: str, prompts: Sequence[PromptPair]
) -> list[str]:
    """One line per doubt about the runs of a comparison and the prompts they share."""
    runs = [trace.manifest(run) for run in (reference, baseline, target) if run is not None]
    return [
        *(line for run in runs for line in _about_run(run)),
        *_about_checkpoints(runs),
        *_about_prompts(runs, prompts),
    ]


def _about_run(run: RunManifest) -> list[str]:
    lines = []
    if run.status != "complete":
        lines.append(f"run {run.run!r} is incomplete (status {run.status})")
    observer = run.provenance.get("observer_effect", {})
    if observer.get("checked") and not observer.get("identical"):
        difference = observer.get("max_abs_difference")
        lines.append(f"capturing changed the logits of run {run.run!r} (largest difference {difference})")
    return lines


def _about_checkpoints(runs: Sequence[RunManifest]) -> list[str]:
    prints = {run.run: run.provenance.get("checkpoint_fingerprint") for run in runs}
    known = {name: value for name, value in prints.items() if value}
    if len(set(known.values())) > 1:
        return [f"runs {', '.join(map(repr, known))} were made from different checkpoints"]
    return []


def _about_prompts(runs: Sequence[RunManifest], prompts: Sequence[PromptPair]) -> list[str]:
    lines = []
    total = len(runs[0].prompts)
    if total and len(prompts) < total:
        lines.append(f"{total - len(prompts)} of {total} prompts of {runs[0].run!r} were not run by the others")
    # The last token of a run is chosen but never computed with, so it may differ.
    apart = [pair for pair in prompts if pair.n_common is not None and pair.n_common < pair.n_tokens - 1]
    if apart:
        lost = sum(pair.n_tokens - 1 - (pair.n_common or 0) for pair in apart)
        lines.append(
            f"{lost} positions of {len(apart)} prompts are left out because the runs chose different tokens; "
            f"capture the target with --teacher {runs[0].run}"
        )
    return lines
