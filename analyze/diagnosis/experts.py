"""What single experts were given and returned, where they are modules: a block's output put together from them.

The rows of an expert are the tokens that were routed to it, in an order of the framework's own. Where inputs are
recorded, each row is found among the block's own inputs by its values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .ranking import Decision, stated
from .runs import FloatArray, IntArray
from .scene import REFERENCE, TARGET, Scene

_NAME = re.compile(r"(.+)\.experts\.(\d+)$")
#: Tokens that two experts must share to be told apart, and how near their values have to be, in units of the noise.
_SHARED, _SAME = 2, 6.0
#: Experts that must be recognised elsewhere before their order is called wrong.
_MISPLACED = 2
#: Expert rows as they are stored: read whole, since no position is known for them.
_ROWS = """
SELECT module, port, dtype, shape, file_offset, nbytes, s.path
FROM tensors t JOIN shards s USING (run, rank, shard)
WHERE run = ? AND phase = ? AND starts_with(module, ?) AND rank = 0 AND call = 0 AND slot IN ('', '0')
    AND len(shape) > 1 AND nbytes > 0
ORDER BY module, port, seq
"""


@dataclass(frozen=True)
class Experts:
    """What the experts of one run returned for the scene's tokens.

    Attributes:
        inputs: what the block was given, `[tokens, features]`.
        outputs: of the modules `NAME` of all experts, by `NAME` (empty for the experts themselves), `[experts, tokens,
            features]`; NaN where an expert did not see a token. Modules that were called with other rows are missing.
    """

    inputs: FloatArray
    outputs: Mapping[str, FloatArray]

    def mixed(self, affinities: FloatArray) -> FloatArray:
        """The block's output, `[tokens, features]`, from affinities `[tokens, experts]`; NaN where one is missing."""
        parts = np.where(affinities.T[..., None] != 0.0, self.outputs[""], 0.0)
        return np.asarray(np.einsum("te,etf->tf", affinities, parts))

    def filled(self, other: Experts) -> Experts:
        """What an expert did not see here, as it is in another run."""
        return Experts(self.inputs, {"": np.where(np.isnan(self.outputs[""]), other.outputs[""], self.outputs[""])})

    def given_the_same(self, other: Experts, noise: float) -> bool:
        """Whether the blocks' inputs agree."""
        apart = np.linalg.norm(self.inputs - other.inputs) / max(np.linalg.norm(other.inputs), 1e-300)
        return bool(apart <= _SAME * noise)

    def same(self, other: Experts, noise: float, ours: str = "", theirs: str | None = None) -> np.ndarray:
        """Whether expert i here returned what expert j there did, on tokens that both saw: `float[experts, experts]`.

        1 for the same, 0 for not, NaN where they share too few tokens.
        """
        a, b = self.outputs[ours], other.outputs[ours if theirs is None else theirs]
        found = np.full((len(a), len(b)), np.nan)
        for i, j in np.ndindex(found.shape):
            both = ~np.isnan(a[i, :, 0]) & ~np.isnan(b[j, :, 0])
            if both.sum() >= _SHARED:
                apart = np.linalg.norm(a[i, both] - b[j, both]) / max(np.linalg.norm(b[j, both]), 1e-300)
                found[i, j] = float(apart <= _SAME * noise)
        return found


def recorded_experts(
    scene: Scene, side: str, parts: tuple[str, ...] = ("",), *, block: str | None = None
) -> Experts | None:
    """The experts of a block as one side recorded them; None when they are no modules or their inputs are missing.

    Args:
        scene: the suspect; experts are seen on its tokens.
        side: `reference` or `target`.
        parts: modules of the experts, empty for themselves.
        block: path of the block, the suspect's own by default.
    """
    block = scene.site.module.removesuffix(".experts") if block is None else block
    run = scene.runs.reference if side == REFERENCE else scene.runs.target
    sites = scene.runs.sites if side == REFERENCE else scene.runs.target_sites
    numbers = sorted({int(m[2]) for name in sites if (m := _NAME.match(name)) and m[1] == block})
    tokens = scene.view(side).given(block)
    if tokens is None or not numbers or (side == TARGET and scene.runs.counterparts.get(scene.site.name) is None):
        return None
    stored: dict[tuple[str, str], list[FloatArray]] = {}
    for row in scene.runs.trace.query(_ROWS, [run, scene.phase, f"{block}.experts."]).to_pylist():
        values = scene.runs.trace.values(
            row["path"], row["dtype"], tuple(row["shape"]), row["file_offset"], row["nbytes"]
        )
        flat = np.asarray(values).reshape(-1, row["shape"][-1]).astype(np.float64)
        stored.setdefault((row["module"], row["port"]), []).append(flat)

    def rows(n: int, part: str, port: str) -> FloatArray | None:
        found = stored.get((f"{block}.experts.{n}{part}", port))
        return np.concatenate(found) if found else None

    outputs: dict[str, FloatArray] = {}
    for part in parts:
        by_number = {n: _placed(tokens, rows(n, "", "input"), rows(n, part, "output")) for n in range(numbers[-1] + 1)}
        width = next((values.shape[1] for values in by_number.values() if values is not None), 0)
        if not width:
            continue
        nothing = np.full((len(tokens), width), np.nan)
        outputs[part] = np.stack([nothing if values is None else values for values in by_number.values()])
    return Experts(tokens, outputs) if "" in outputs else None


def misplaced_expert(scene: Scene) -> Decision | None:
    """An expert that returns what another expert of the reference does, on the tokens that both are given there."""
    match = _NAME.match(scene.site.module)
    if match is None or scene.site.port != "output":
        return None
    block, number = match[1], int(match[2])
    ours = recorded_experts(scene, REFERENCE, block=block)
    if ours is None or number >= len(ours.outputs[""]):
        return None
    theirs = Experts(ours.inputs, {"": scene.target[None]})
    same = theirs.same(ours, scene.noise)[0]
    if same[number] != 0.0 or (same == 1.0).sum() != 1:
        return None
    other = int((same == 1.0).argmax())
    shared = ~np.isnan(ours.outputs[""][other, :, 0])
    expected = ours.outputs[""][other, shared]
    left = float(np.linalg.norm(scene.target[shared] - expected))
    error = float(np.linalg.norm(scene.target[shared] - scene.reference[shared]))
    return stated(
        "expert_order",
        f"expert {number} returns what expert {other} should, on all {int(shared.sum())} tokens that both are given",
        "stack the experts in the order of the checkpoint, and shard them over ranks in that order",
        {"expert": number, "is": other, "tokens": int(shared.sum())},
        confidence=max(0.0, 1.0 - left / error),
    )


def _placed(tokens: FloatArray, given: FloatArray | None, returned: FloatArray | None) -> FloatArray | None:
    """An expert's outputs at the tokens that it was given, `[tokens, features]`; NaN elsewhere."""
    if given is None or returned is None or len(given) != len(returned) or given.shape[1] != tokens.shape[1]:
        return None
    places: dict[bytes, int] = {row.tobytes(): number for number, row in enumerate(given)}
    at: IntArray = np.array([places.get(row.tobytes(), -1) for row in tokens])
    values = np.full((len(tokens), returned.shape[1]), np.nan)
    values[at >= 0] = returned[at[at >= 0]]
    return values


def order_of(target: Experts, reference: Experts, noise: float) -> list[int] | None:
    """For every expert of the target the reference's that it is, -1 for unknown; None when none is misplaced for sure.

    Args:
        target, reference: of the same tokens.
        noise: relative error to expect.
    """
    same = target.same(reference, noise)
    order = [int((row == 1.0).argmax()) if (row == 1.0).sum() == 1 else -1 for row in same]
    known = [was for was in order if was >= 0]
    if len(known) < _MISPLACED or len(set(known)) < len(known) or (same.diagonal() == 1.0).any():
        return None
    return order
