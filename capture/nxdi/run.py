"""One capture of a port on a CPU, from arguments to a finished run: the parent of the ranks."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from ...porting.environment import Environment, find_environment, require_sources
from ...store.errors import CaptureError, InputError, SleuthError
from ...store.integrity import repair
from ...store.manifest import ROLES, Module, Prompt, PromptTokens, RunManifest, write_manifest
from ...store.progress import Progress, no_progress
from ...store.trace import Trace
from ..generate import Generation
from ..hf import ModelSource, checkpoint_fingerprint, load_config, parse_dtype, quiet_transformers, stop_tokens
from ..hf_run import CaptureSummary, HuggingFaceCapture, prepare_prompts, selection_facts
from ..prompts import EncodedPrompt, PromptInput, source_facts
from ..provenance import environment
from ..selection import Selection
from .job import RankJob
from .port import parse_class
from .ranks import RankGroup, last_words

_WORKER = "tensorsleuth.capture.nxdi.worker"
#: Default lengths of prefill bucket and cache are a multiple of this.
_LENGTH_STEP = 64
#: Ways to spread a model over ranks, other than tensor parallelism, that a CPU run does not know.
_OTHER_PARALLELISM = (
    "pp_degree", "ep_degree", "moe_ep_degree", "moe_cte_ep_degree", "moe_tkg_ep_degree", "cp_degree", "mlp_cp_degree",
    "attention_dp_degree",
)  # fmt: skip


@dataclass(frozen=True)
class NxdiCapture:
    """Arguments of a capture.

    Attributes:
        model: folder of the checkpoint.
        port: the port's class as FILE:CLASS.
        run: name of the new run.
        role: `reference`, `baseline` or `target`.
        config: the configuration class as FILE:CLASS, empty for the one the port names.
        dtype: the model's dtype by name.
        tp: tensor-parallel degree: number of processes.
        prompts: prompts; empty when a teacher's prompts are used.
        teacher: run whose tokens are fed instead of greedy ones.
        generation: how prompts are continued.
        selection: which sites are kept.
        statistics_only: keep statistics and checksums, not values.
        scores: record attention scores and weights.
        library_capture: record through NxD Inference's own tensor capture, as on a device.
        length: prefill bucket and cache length; the smallest multiple of 64 that fits by default.
        options: further arguments of the port's NeuronConfig, for example `fused_qkv`.
    """

    model: Path
    port: str
    run: str
    role: str
    config: str = ""
    dtype: str = "float32"
    tp: int = 1
    prompts: Sequence[PromptInput] = ()
    teacher: str | None = None
    generation: Generation = field(default_factory=Generation)
    selection: Selection = field(default_factory=Selection)
    statistics_only: bool = False
    scores: bool = False
    library_capture: bool = False
    length: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def capture_on_cpu(trace: Trace, capture: NxdiCapture, *, progress: Progress = no_progress) -> CaptureSummary:
    """Run a port on a CPU, one process per rank, and record every rank.

    Args:
        trace: the trace that receives the run.
        capture: what to do.
        progress: called with a stage, steps done and steps in all.

    Raises:
        SleuthError: an argument cannot be used, or a rank failed; in the second case the run is marked `failed`
            and holds what was recorded.
    """
    found = find_environment()
    require_sources(found)
    with tempfile.TemporaryDirectory(prefix="sleuth-nxdi-") as scratch:
        folder = Path(scratch)
        job = prepare_job(trace, capture, folder)
        manifest = _manifest(capture, job, found, checkpoint_fingerprint(ModelSource(capture.model)))
        return _Session(trace, capture, manifest, folder, progress).run()


def prepare_job(trace: Trace, capture: NxdiCapture, folder: Path) -> RankJob:
    """What the ranks of a capture are told, also written to `folder/job.json`.

    Raises:
        SleuthError: an argument cannot be used.
    """
    _check(capture)
    quiet_transformers()
    source = ModelSource(capture.model)
    config = load_config(source)
    prompts = prepare_prompts(
        trace,
        HuggingFaceCapture(
            source,
            capture.run,
            capture.role,
            capture.dtype,
            capture.prompts,
            capture.teacher,
            capture.generation,
        ),
        config,
    )
    generation = replace(capture.generation, stop_tokens=stop_tokens(config), padding="right")
    length = capture.length or length_for(prompts, generation, config.get_text_config())
    job = RankJob(
        model=str(capture.model.resolve()),
        port=capture.port,
        config=capture.config,
        rendezvous=str(folder / "rendezvous"),
        run_folder=str(trace.run_folder(capture.run).resolve()),
        run=capture.run,
        dtype=str(parse_dtype(capture.dtype)).removeprefix("torch."),
        tp=capture.tp,
        length=length,
        prompts=tuple(prompts),
        generation=generation,
        selection=capture.selection,
        statistics_only=capture.statistics_only,
        scores=capture.scores,
        library_capture=capture.library_capture,
        options=source_options(prompts, length) | capture.options,
    )
    job.write(folder / "job.json")
    return job


class _Session:
    """The ranks of one capture and what they have reported."""

    def __init__(
        self, trace: Trace, capture: NxdiCapture, manifest: RunManifest, folder: Path, progress: Progress
    ) -> None:
        self._trace, self._capture, self._manifest = trace, capture, manifest
        self._folder, self._progress = folder, progress
        self._ready: set[int] = set()
        self._results: dict[int, dict[str, Any]] = {}
        self._errors: dict[int, dict[str, Any]] = {}
        self._began = False
        self._started = time.perf_counter()

    def run(self) -> CaptureSummary:
        command = [sys.executable, "-m", _WORKER, str(self._folder / "job.json")]
        variables = {"NXD_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
        self._progress("load", 0, 1)
        with ExitStack() as unless_all_end:
            unless_all_end.callback(self._give_up)
            with RankGroup(command, self._capture.tp, self._folder, variables) as group:
                self._group = group
                codes = group.run(self._on_event)
                words = {rank.number: last_words(rank.log) for rank in group.ranks}
            unless_all_end.pop_all()
        if any(codes) or len(self._results) < self._capture.tp:
            self._give_up()
            raise self._error(codes, words)
        return self._finish()

    def _on_event(self, rank: int, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "progress":
            self._progress(event["stage"], event["done"], event["total"])
        elif kind == "result":
            self._results[rank] = event
        elif kind == "error":
            self._errors[rank] = event
        elif kind == "ready":
            self._ready.add(rank)
            if len(self._ready) == self._capture.tp:
                self._begin()

    def _begin(self) -> None:
        self._manifest = self._trace.begin_run(self._manifest)
        self._began, self._started = True, time.perf_counter()
        path = self._folder / "manifest.json"
        path.write_bytes(self._manifest.to_json())
        self._group.tell(str(path))

    def _give_up(self) -> None:
        """Keep what was recorded, as a failed run."""
        if self._began:
            write_manifest(self._trace.run_folder(self._manifest.run), self._collected("failed"))
            repair(self._trace)

    def _finish(self) -> CaptureSummary:
        manifest = self._collected("complete")
        self._trace.finish_run(manifest)
        facts = manifest.provenance
        return CaptureSummary(
            run=manifest.run,
            n_prompts=len(manifest.prompts),
            **facts["captured"],
            seconds=time.perf_counter() - self._started,
            plan=None,
            observer=facts["observer_effect"],
            skipped=facts["skipped"],
        )

    def _collected(self, status: str) -> RunManifest:
        facts = dict(self._manifest.provenance)
        ranks = [self._results[rank] for rank in sorted(self._results)]
        first = ranks[0] if ranks else {"facts": {}, "tokens": [], "modules": []}
        facts["observer_effect"] = first["facts"].get("observer_effect", {"checked": False})
        facts["notes"] = first["facts"].get("notes", [])
        facts["skipped"] = {site: why for rank in ranks for site, why in rank["facts"]["skipped"].items()}
        prints = [rank["facts"]["weights_fingerprint"] for rank in ranks]
        if prints:
            joined = xxhash.xxh3_128_hexdigest("".join(prints).encode())
            facts["weights_fingerprint"] = prints[0] if len(prints) == 1 else joined
        facts["captured"] = {
            name: sum(rank["totals"][name] for rank in ranks) for name in ("n_tensors", "nbytes", "stored_nbytes")
        }
        if self._errors:
            facts["errors"] = {str(rank): event["message"] for rank, event in sorted(self._errors.items())}
        return replace(
            self._manifest,
            status=status,
            provenance=facts,
            tokens=tuple(PromptTokens(**{**t, "token_ids": tuple(t["token_ids"])}) for t in first["tokens"]),
            modules=tuple(Module(**module) for module in first["modules"]),
        )

    def _error(self, codes: Sequence[int], words: dict[int, str]) -> SleuthError:
        for event in self._errors.values():
            if event["expected"]:
                return InputError(event["message"])
        killed = [rank for rank, code in enumerate(codes) if code < 0 and rank not in self._errors]
        rank = killed[0] if killed else min(self._errors, default=0)
        signal = f"killed by signal {-codes[rank]}" if codes[rank] < 0 else ""
        why = signal or self._errors.get(rank, {}).get("message") or words.get(rank) or "no reason given"
        note = "; the run is kept as failed, with what was recorded" if self._began else ""
        return CaptureError(f"rank {rank} of {self._capture.tp} failed: {why}{note}")


def _check(capture: NxdiCapture) -> None:
    if capture.role not in ROLES:
        raise InputError(f"role {capture.role!r} is unknown; choose one of {', '.join(ROLES)}")
    parse_class(capture.port)
    if capture.config:
        parse_class(capture.config)
    if capture.dtype in ("float64", "fp64"):
        raise InputError("NxD Inference does not run in float64; choose float32 or bfloat16")
    for name in _OTHER_PARALLELISM:
        if capture.options.get(name, 1) != 1:
            raise InputError(
                f"--neuron {name}={capture.options[name]} spreads the model in a way that a capture on a CPU does not "
                "know; leave it out and use --tp alone"
            )
    if capture.tp < 1:
        raise InputError(f"--tp {capture.tp} is not a number of ranks; give 1 or more")


def length_for(prompts: Sequence[EncodedPrompt], generation: Generation, config: Any) -> int:
    """The smallest length that fits; a prefill bucket smaller than a sliding window cannot be read back."""
    window = getattr(config, "sliding_window", None) or 0
    longest = max(
        len(prompt.token_ids) + (len(prompt.forced) if prompt.forced is not None else generation.new_tokens)
        for prompt in prompts
    )
    return -(-max(longest, window) // _LENGTH_STEP) * _LENGTH_STEP


def source_options(prompts: Sequence[EncodedPrompt], length: int) -> dict[str, int]:
    """How long a source the encoder of an encoder-decoder is built for, as an option of the port's NeuronConfig.

    It is another length than the decoder's, so that tensors tell whose tokens they hold; empty without an encoder.
    """
    longest = max((len(prompt.source_ids) for prompt in prompts if prompt.source_ids is not None), default=0)
    rounded = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    return {"source_len": rounded + _LENGTH_STEP * (rounded == length)} if longest else {}


def _manifest(capture: NxdiCapture, job: RankJob, found: Environment, fingerprint: str) -> RunManifest:
    facts = environment()
    facts.update(
        checkpoint_fingerprint=fingerprint,
        teacher=capture.teacher,
        port=capture.port,
        nxdi=found.nxdi.version if found.nxdi else None,
        nxd=found.nxd.version if found.nxd else None,
        stand_in=not found.has_sdk,
        length=job.length,
        options=job.options,
        **source_facts(job.prompts),
        library_capture=capture.library_capture,
        generation={k: v for k, v in dataclasses.asdict(job.generation).items() if k != "stop_tokens"},
        selection=selection_facts(capture.selection),
        statistics_only=capture.statistics_only,
        observer_effect={"checked": False},
        note="NxD Inference on a CPU: plain operators, no compiler, no device kernels",
    )
    return RunManifest(
        ordinal=0,
        run=capture.run,
        role=capture.role,
        stack="nxdi-cpu",
        model=str(capture.model),
        dtype=job.dtype,
        device="cpu",
        tp=capture.tp,
        status="running",
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        provenance=facts,
        prompts=tuple(Prompt(index, p.id, p.text, len(p.token_ids)) for index, p in enumerate(job.prompts)),
    )
