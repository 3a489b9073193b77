"""What the rows of a token embedding tell about the tokens of a dump.

An embedding is a lookup: equal tokens give equal rows, bit for bit, in every prompt and step, and padding repeats one
row. So the rows confirm or refute a list of tokens, and show where padding begins. If another run of the trace holds
its embedding rows too, they are compared by value, which tells prompts of equal length apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ...store.dims import by_position
from ...store.trace import Trace
from ..pending import to_numpy
from .modules import is_embedding
from .tokens import KnownPrompt

#: Leading features that are compared by value.
_FEATURES = 32
#: Largest relative difference of two embedding rows of one token in different precisions (BF16 rounds by 0.4 %).
_CLOSE = 0.02

Rows = npt.NDArray[np.float32]
TokenRows = Mapping[int, Rows]


@dataclass(frozen=True)
class EmbeddingRows:
    """The embedding of one batch row of one forward pass.

    Attributes:
        digests: one hash per position.
        values: the first features of every position, float32.
    """

    digests: tuple[bytes, ...]
    values: Rows

    @property
    def n_distinct_end(self) -> int | None:
        """Length without the repeated row at the end, None when the last row is not repeated."""
        repeated = 1
        while repeated < len(self.digests) and self.digests[-repeated - 1] == self.digests[-1]:
            repeated += 1
        return len(self.digests) - repeated if repeated > 1 else None


def embedding_rows(tensor: torch.Tensor) -> list[EmbeddingRows]:
    """The rows of an embedding `[batch, length, hidden]`, one entry per batch row."""
    found = []
    for batch_row in tensor:
        array = to_numpy(batch_row)
        raw = array.view(np.uint8) if array.itemsize > 1 else array
        digests = tuple(xxhash.xxh3_64_digest(np.ascontiguousarray(row).data) for row in raw)
        found.append(EmbeddingRows(digests, array[:, :_FEATURES].astype(np.float32)))
    return found


class TokenEvidence:
    """Checks tokens against embedding rows, remembering which row each token had."""

    def __init__(self, known: TokenRows) -> None:
        """`known` holds the first embedding features of some tokens, from another run; it may be empty."""
        self.by_value = bool(known)
        self._known = known

    def fits(self, rows: EmbeddingRows, tokens: Sequence[int]) -> bool:
        """Whether the rows can be the embeddings of exactly these tokens, followed by padding."""
        padding = rows.digests[len(tokens) :]
        if len(tokens) > len(rows.digests) or len(set(padding)) > 1:
            return False
        return Lookup().extend(rows, tokens) and all(
            self._close(rows.values[i], token) for i, token in enumerate(tokens)
        )

    def _close(self, row: Rows, token: int) -> bool:
        known = self._known.get(token)
        if known is None:
            return True
        n = min(len(row), len(known))
        scale = float(np.linalg.norm(known[:n]))
        return float(np.linalg.norm(row[:n] - known[:n])) <= _CLOSE * scale + 1e-30


class Lookup:
    """The embedding as the rows show it: equal tokens have equal rows, different tokens different ones."""

    def __init__(self) -> None:
        """No token is known yet."""
        self._row_of: dict[int, bytes] = {}
        self._token_of: dict[bytes, int] = {}

    def extend(self, rows: EmbeddingRows, tokens: Sequence[int]) -> bool:
        """Learn the first rows as those of the tokens; False at the first contradiction."""
        for token, digest in zip(tokens, rows.digests, strict=False):
            if self._row_of.get(token, digest) != digest or self._token_of.get(digest, token) != token:
                return False
            self._row_of[token], self._token_of[digest] = digest, token
        return True


def assign(rows: Sequence[EmbeddingRows], prompts: Sequence[KnownPrompt], evidence: TokenEvidence) -> list[int] | None:
    """Which prompt each batch row computes, by content; None when some row fits no prompt that is left.

    A row takes the first prompt in the given order that fits, so that identical prompts keep their order.
    """
    left = list(range(len(prompts)))
    chosen = []
    for row in rows:
        fitting = [p for p in left if evidence.fits(row, prompts[p].token_ids[: prompts[p].n_prompt])]
        if not fitting:
            return None
        # A longer prompt that fits explains more rows than its own prefix does.
        best = max(fitting, key=lambda p: (prompts[p].n_prompt or 0, -p))
        chosen.append(best)
        left.remove(best)
    return chosen


def token_rows(trace: Trace, run: str) -> TokenRows:
    """The embedding row of every token that a run embedded, first features only; empty when it stored none."""
    tokens = {item.prompt: item.token_ids for item in trace.manifest(run).tokens}
    found: dict[int, Rows] = {}
    for row in _embeddings(trace, run):
        ids = tokens.get(row["prompt"], ())
        values = trace.values(row["path"], row["dtype"], tuple(row["shape"]), row["file_offset"], row["nbytes"])
        start = row["position_start"]
        for token, vector in zip(ids[start:], by_position(values, row["dims"]), strict=False):
            found.setdefault(token, vector[:_FEATURES].astype(np.float32))
    return found


def _embeddings(trace: Trace, run: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = trace.query(
        """SELECT module, prompt, position_start, dims, dtype, shape, file_offset, nbytes, s.path
           FROM tensors t JOIN shards s USING (run, rank, shard)
           WHERE run = ? AND rank = 0 AND port = 'output' AND position_start IS NOT NULL AND dataset <> ''""",
        [run],
    ).to_pylist()
    return [row for row in rows if is_embedding(row["module"])]
