"""Whether the reference's model, loaded now, computes what it computed when it was captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...analyze.pairs import Pair
from ...analyze.sites import Site, SiteInfo
from ...store.errors import InputError
from ...store.index import TensorKey
from ...store.manifest import RunManifest
from ...store.progress import Progress, no_progress
from ...store.trace import Trace, site_name
from ..generate import Generation, padded
from ..hf import HuggingFaceCausalModel, ModelSource, checkpoint_fingerprint, load_model, parse_dtype
from ..layout import layout_from_mask
from ..pending import PendingTensor
from ..prompts import teacher_prompts
from ..provenance import weights_fingerprint
from ..selection import Selection
from .recorder import Replaying, ReplayRecorder
from .values import MappedValues

#: Largest relative difference that another processor or number of threads explains, for float32.
TOLERANCE = 1e-5
_UNIT = {"float32": 1.0, "float64": 1.0, "float16": 2.0**13, "bfloat16": 2.0**16}


def find_model(reference: RunManifest, path: Path | None) -> ModelSource:
    """The model that a reference was captured from.

    Args:
        reference: the reference run.
        path: where it is now; where it was then by default.

    Raises:
        InputError: the reference was not made by Hugging Face code, or the files are not the same ones.
    """
    if reference.stack != "hf":
        raise InputError(
            f"the modules of run {reference.run!r} cannot be run here: its stack is {reference.stack}, only those of "
            "'sleuth capture hf' can"
        )
    source = ModelSource(path or Path(reference.model), seed=reference.provenance.get("seed"))
    if not source.path.exists():
        raise InputError(f"the model of run {reference.run!r} is not at {source.path} any more; name it with --model")
    known = reference.provenance.get("checkpoint_fingerprint")
    if known and checkpoint_fingerprint(source) != known:
        raise InputError(
            f"{source.path} is not the checkpoint that run {reference.run!r} was captured from (its configuration or "
            "weights differ); name that one with --model"
        )
    return replace(source, attention=reference.provenance.get("attention"))


def check_reference(
    trace: Trace,
    reference: RunManifest,
    sites: Sequence[SiteInfo],
    source: ModelSource,
    *,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Replay the reference on its own inputs, for the first prefill, and hold it against what it recorded.

    Returns:
        `n_sites` checked, whether all are `identical` bit for bit, `max_relative_l2` over them.

    Raises:
        InputError: a module computes something else now.
    """
    progress("check the reference", 0, 1)
    model = load_model(source, parse_dtype(reference.dtype))
    usable = [info for info in sites if info.positioned and not info.n_statistics_only and info.site.port == "output"]
    itself = [Pair(info.site, info.site, None, 1.0, "itself") for info in usable]
    checker = _Checker(trace, reference.run)
    values = MappedValues(trace, reference.run, itself, sites)
    replaying = Replaying(values, {info.site for info in usable})
    recorder = ReplayRecorder(model, checker, Selection(), replaying=replaying)
    facts = reference.provenance.get("generation", {})
    generation = Generation(**{k: v for k, v in facts.items() if k in Generation.__dataclass_fields__})
    first, batch = next(iter(generation.batches(teacher_prompts(reference))))
    ids, mask = padded(batch, generation)
    prompts = range(first, first + len(batch))
    layout = layout_from_mask(mask, ids.shape[1], phase="prefill", step=0, prompts=prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    recorder.attach()
    try:
        with torch.no_grad(), recorder.guard, recorder.replay(layout, [layout]):
            HuggingFaceCausalModel(model)(ids, mask, positions, None, use_cache=False)
    finally:
        recorder.detach()
        trace.release_pages()
    return checker.result(reference, weights_fingerprint(model))


class _Checker:
    """Takes tensors as a writer does, and compares each with the stored one."""

    def __init__(self, trace: Trace, run: str) -> None:
        statement = """
            SELECT module, slot, call, prompt, dtype, shape, file_offset, nbytes, s.path
            FROM tensors t JOIN shards s USING (run, shard)
            WHERE run = ? AND port = 'output' AND phase = 'prefill' AND step = 0 AND dataset <> ''"""
        self._trace = trace
        self._stored = {
            (Site(row["module"], "output", row["slot"], row["call"]), row["prompt"]): row
            for row in trace.query(statement, [run]).to_pylist()
        }
        self._sites: set[Site] = set()
        self._worst = (0.0, "")
        self._identical = True

    def put(self, key: TensorKey, source: PendingTensor) -> None:
        """Compare one tensor with the stored one."""
        site = Site(key.module, key.port, key.slot, key.call)
        row = self._stored.get((site, key.prompt or 0))
        if row is None:
            return
        self._sites.add(site)
        stored = self._trace.values(row["path"], row["dtype"], tuple(row["shape"]), row["file_offset"], row["nbytes"])
        with source.values() as own:
            if own.shape == stored.shape and own.dtype == stored.dtype and own.tobytes() == stored.tobytes():
                return
            self._identical = False
            distance = _relative_l2(own, stored) if own.shape == stored.shape else np.inf
        self._worst = max(self._worst, (distance, site_name(key.module, key.port, key.slot, key.call)))

    def flush(self) -> None:
        """Nothing waits."""

    def result(self, reference: RunManifest, fingerprint: str) -> dict[str, Any]:
        """What was found; see `check_reference`."""
        distance, site = self._worst
        if distance > TOLERANCE * _UNIT[reference.dtype]:
            why = _why(reference, fingerprint)
            raise InputError(
                f"the model does not reproduce run {reference.run!r}: {site} is {distance:.2g} away (relative L2) on "
                f"the same input{why}; use the weights and the transformers version of that run"
            )
        return {
            "n_sites": len(self._sites),
            "identical": self._identical,
            "max_relative_l2": distance,
        }


def _why(reference: RunManifest, fingerprint: str) -> str:
    import transformers

    reasons = []
    if reference.provenance.get("weights_fingerprint") != fingerprint:
        reasons.append("the weights differ")
    then = reference.provenance.get("packages", {}).get("transformers")
    if then != transformers.__version__:
        reasons.append(f"it was captured with transformers {then}, this is {transformers.__version__}")
    return f" ({', '.join(reasons)})" if reasons else ""


def _relative_l2(one: Any, other: Any) -> float:
    difference = one.astype(np.float64) - other.astype(np.float64)
    norm = float(np.linalg.norm(other.astype(np.float64)))
    found = float(np.linalg.norm(difference))
    return found / norm if norm else (np.inf if found else 0.0)
