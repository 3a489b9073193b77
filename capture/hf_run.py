"""One capture of a Hugging Face causal language model, from arguments to a finished run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..store.errors import InputError, SleuthError
from ..store.manifest import Prompt, PromptTokens
from ..store.progress import Progress, no_progress
from ..store.trace import Trace
from .drive import bare_prefill, observer_effect, run_prompts
from .generate import CausalModel, Generation
from .hf import (
    ModelSource,
    checkpoint_fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    parse_dtype,
    position_limit,
    quiet_transformers,
    stop_tokens,
)
from .hf_encoder_decoder import adapter_of, start_token
from .plan import Plan, plan_capture
from .prompts import EncodedPrompt, PromptInput, check_lengths, encode_prompts, source_facts, teacher_prompts
from .recorder import record
from .replicate import Replicate
from .selection import Selection
from .widening import computes_in


@dataclass(frozen=True)
class HuggingFaceCapture:
    """Arguments of a capture.

    Attributes:
        source: the model.
        run: name of the new run.
        role: `reference`, `baseline` or `target`.
        dtype: the model's dtype by name.
        prompts: prompts; empty when a teacher's prompts are used.
        teacher: run whose tokens are fed instead of greedy ones.
        generation: how prompts are continued; its stop tokens come from the model.
        selection: which sites are kept.
        statistics_only: keep statistics and checksums, not values.
        replicate: rounds otherwise than the run that it replicates; None for an ordinary run.
    """

    source: ModelSource
    run: str
    role: str
    dtype: str = "float32"
    prompts: Sequence[PromptInput] = ()
    teacher: str | None = None
    generation: Generation = field(default_factory=Generation)
    selection: Selection = field(default_factory=Selection)
    statistics_only: bool = False
    replicate: Replicate | None = None


@dataclass(frozen=True)
class CaptureSummary:
    """What a capture did.

    Attributes:
        run: its name.
        n_prompts: prompts run.
        n_tensors: rows in the index.
        nbytes: size of all values.
        stored_nbytes: bytes written, equal contents once.
        seconds: wall time from the first recorded forward pass to the run being in the catalog.
        plan: the prediction, None when the model cannot be planned.
        observer: whether capturing changed the logits, with the largest difference.
        skipped: sites that could not be stored, with the reason.
    """

    run: str
    n_prompts: int
    n_tensors: int
    nbytes: int
    stored_nbytes: int
    seconds: float
    plan: Plan | None
    observer: dict[str, Any]
    skipped: dict[str, str]


def prepare_prompts(trace: Trace, capture: HuggingFaceCapture, config: Any) -> list[EncodedPrompt]:
    """Encode the prompts of a capture, or take them from its teacher.

    Raises:
        InputError: there are none, or the model cannot run them.
    """
    text = config.get_text_config()
    if capture.teacher is not None and not capture.prompts:
        prompts = teacher_prompts(trace.manifest(capture.teacher))
    else:
        tokenize = load_tokenizer(capture.source)
        prompts = encode_prompts(
            capture.prompts, tokenize, vocabulary=getattr(text, "vocab_size", None), start=start_token(config)
        )
        if capture.teacher is not None:
            prompts = _follow(prompts, trace, capture.teacher)
    if not prompts:
        raise InputError("there is no prompt; give --prompt TEXT, --prompts FILE or --teacher RUN")
    check_lengths(prompts, capture.generation.new_tokens, position_limit(config))
    return prompts


def capture_hugging_face(
    trace: Trace, capture: HuggingFaceCapture, *, progress: Progress = no_progress
) -> CaptureSummary:
    """Load a model, run it over prompts and record it.

    Args:
        trace: the trace that receives the run.
        capture: what to do.
        progress: called with a stage, steps done and steps in all.

    Raises:
        SleuthError: an argument cannot be used, or values could not be written.
    """
    quiet_transformers()
    config = load_config(capture.source)
    prompts = prepare_prompts(trace, capture, config)
    capture = replace(capture, generation=replace(capture.generation, stop_tokens=stop_tokens(config)))
    plan, plan_error = try_plan(trace, capture, prompts)
    progress("load", 0, 1)
    model = load_model(capture.source, parse_dtype(capture.dtype))
    if capture.replicate is not None:
        source = capture.replicate.source(capture.source, getattr(model.config, "_attn_implementation", None))
        model = model if source == capture.source else load_model(source, parse_dtype(capture.dtype))
    fingerprint = checkpoint_fingerprint(capture.source)
    facts: dict[str, Any] = {
        "config": config.to_dict(),
        "checkpoint_fingerprint": fingerprint,
        "seed": capture.source.seed,
        "attention": getattr(model.config, "_attn_implementation", None),
        "weights_widened_by_layer": computes_in(model) is not None,
        "teacher": capture.teacher,
        "generation": {k: v for k, v in asdict(capture.generation).items() if k != "stop_tokens"},
        "selection": selection_facts(capture.selection),
        "plan": plan.as_dict() if plan else {"error": plan_error},
        **source_facts(prompts),
    }
    adapter = adapter_of(model)
    with ExitStack() as stack:
        if capture.replicate is not None:
            dtype = str(parse_dtype(capture.dtype)).removeprefix("torch.")
            facts["replicate"] = capture.replicate.facts(trace, capture.run, fingerprint, dtype)
            adapter = stack.enter_context(capture.replicate.running(model, adapter))
        seconds = run_recorded(
            trace,
            model,
            adapter,
            prompts,
            capture.generation,
            run=capture.run,
            role=capture.role,
            stack="hf",
            model_name=str(capture.source.path),
            selection=capture.selection,
            statistics_only=capture.statistics_only,
            facts=facts,
            progress=progress,
        )
    return CaptureSummary(
        run=capture.run,
        n_prompts=len(prompts),
        **facts["captured"],
        seconds=seconds,
        plan=plan,
        observer=facts["observer_effect"],
        skipped=facts["skipped"],
    )


def run_recorded(
    trace: Trace,
    model: torch.nn.Module,
    adapter: CausalModel,
    prompts: Sequence[EncodedPrompt],
    generation: Generation,
    *,
    run: str,
    role: str,
    stack: str,
    model_name: str,
    selection: Selection,
    facts: dict[str, Any],
    statistics_only: bool = False,
    progress: Progress = no_progress,
) -> float:
    """Run any causal model over prompts as one recorded run; returns the seconds it took.

    The first prefill also runs once without hooks beforehand: the difference of its logits is the observer effect,
    kept in `facts["observer_effect"]`.
    """
    tokens: list[PromptTokens] = []
    listing = [Prompt(index, p.id, p.text, len(p.token_ids)) for index, p in enumerate(prompts)]
    with torch.no_grad():
        progress("forward without hooks", 0, 1)
        started = time.perf_counter()
        bare = bare_prefill(adapter, prompts, generation)
        facts["bare_prefill_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        facts["observer_effect"] = {"checked": False}
        with record(
            trace,
            model,
            run=run,
            role=role,
            selection=selection,
            stack=stack,
            model_name=model_name,
            prompts=listing,
            tokens=lambda: tokens,
            provenance=facts,
            statistics_only=statistics_only,
        ) as recorder:
            captured = run_prompts(adapter, prompts, generation, recorder.step, tokens=tokens, progress=progress)
            facts["observer_effect"] = observer_effect(bare, captured)
            progress("store", 0, 1)
    return time.perf_counter() - started


def try_plan(
    trace: Trace, capture: HuggingFaceCapture, prompts: Sequence[EncodedPrompt]
) -> tuple[Plan | None, str | None]:
    """Predict a capture; a model whose code needs values, or fails without them, gives the reason instead.

    Raises:
        SleuthError: the model cannot be loaded, with values or without.
    """
    dtype = parse_dtype(capture.dtype)
    seeded = replace(capture.source, seed=capture.source.seed or 0)

    def build() -> tuple[torch.nn.Module, CausalModel]:
        model = load_model(seeded, dtype)
        return model, adapter_of(model)

    try:
        plan = plan_capture(
            build,
            prompts,
            capture.generation,
            capture.selection,
            folder=trace.path,
            dtype=dtype,
            statistics_only=capture.statistics_only,
        )
    except SleuthError:
        raise
    except Exception as error:  # noqa: BLE001 (the model's own code; without a prediction the capture goes on)
        return None, f"{type(error).__name__}: {error}"
    return plan, None


def _follow(prompts: Sequence[EncodedPrompt], trace: Trace, teacher: str) -> list[EncodedPrompt]:
    followed = teacher_prompts(trace.manifest(teacher))
    known = {(prompt.source_ids, prompt.token_ids): prompt.forced for prompt in followed}
    for prompt in prompts:
        if (prompt.source_ids, prompt.token_ids) not in known:
            raise InputError(f"prompt {prompt.id!r} was not run by {teacher!r}; leave --prompts out to use its prompts")
    return [replace(prompt, forced=known[prompt.source_ids, prompt.token_ids]) for prompt in prompts]


def selection_facts(selection: Selection) -> dict[str, Any]:
    positions = selection.positions
    return {
        "include": list(selection.include),
        "exclude": list(selection.exclude),
        "layers": sorted(selection.layers) if selection.layers is not None else None,
        "positions": [positions.start, positions.stop - 1] if positions is not None else None,
        "inputs": selection.inputs,
    }
