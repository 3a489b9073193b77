"""The tokens that a dump was made with: from a file, or from another run of the trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...store.errors import InputError
from ...store.trace import Trace


@dataclass(frozen=True)
class KnownPrompt:
    """The tokens of one prompt.

    Attributes:
        id: the user's name for it.
        text: its text, if known.
        token_ids: prompt tokens, then what was generated as far as it is known.
        n_prompt: number of prompt tokens; None when the source does not say where generation starts.
    """

    id: str
    text: str | None
    token_ids: tuple[int, ...]
    n_prompt: int | None


@dataclass(frozen=True)
class Hints:
    """What is known of a dump from outside.

    Attributes:
        known: the tokens of its prompts, empty when unknown.
        rows: first embedding features of some tokens, from the run that the tokens came from.
        widths: features per position of that run's outputs, by module path without a leading `model.`.
        tp: tensor-parallel degree.
        rank: the rank that a dump of one rank comes from.
    """

    known: Sequence[KnownPrompt] = ()
    rows: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    tp: int = 1
    rank: int = 0

    def is_whole(self, module: str, features: int) -> bool:
        """Whether a tensor of so many features is known to be no shard."""
        return self.widths.get(module.removeprefix("model.")) == features


def read_tokens(path: Path) -> list[KnownPrompt]:
    """Read a tokens file: JSONL, `{"token_ids": [...], "n_prompt": 6, "id": "a"}`, the last two optional.

    Raises:
        InputError: naming the first line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tokens file {path} cannot be read: {error}") from error
    prompts = [_parse(line, number, f"{path}:{number + 1}") for number, line in enumerate(lines) if line.strip()]
    if not prompts:
        raise InputError(f'tokens file {path} holds no prompt; write one {{"token_ids": [...]}} a line')
    return prompts


def _parse(line: str, number: int, where: str) -> KnownPrompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    ids = value.get("token_ids") if isinstance(value, dict) else None
    if not isinstance(ids, list) or not ids or not all(_is_token(token) for token in ids):
        raise InputError(f'{where} needs "token_ids", a list of token ids (text alone gives no positions)')
    n_prompt = value.get("n_prompt")
    if n_prompt is not None and not (_is_token(n_prompt) and 1 <= n_prompt <= len(ids)):
        raise InputError(f'{where}: "n_prompt" must be a number from 1 to {len(ids)}, the number of token ids')
    text = value.get("text")
    return KnownPrompt(str(value.get("id", number)), text if isinstance(text, str) else None, tuple(ids), n_prompt)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def tokens_of_run(trace: Trace, run: str) -> list[KnownPrompt]:
    """The prompts of another run of the trace.

    Raises:
        TraceNotFoundError: the trace has no such run.
        InputError: it has no tokens.
    """
    manifest = trace.manifest(run)
    ids = {item.prompt: item.token_ids for item in manifest.tokens}
    known = [KnownPrompt(p.id, p.text, ids[p.prompt], p.n_tokens) for p in manifest.prompts if p.prompt in ids]
    if not known:
        raise InputError(f"run {run!r} has no tokens; name a run that was captured with prompts, or give --tokens FILE")
    return known


def widths_of_run(trace: Trace, run: str) -> dict[str, int]:
    """Features per position of a run's module outputs, by module path without a leading `model.`."""
    rows = trace.query(
        """SELECT module, max(list_product(shape)::BIGINT // position_count) AS features FROM tensors
           WHERE run = ? AND port = 'output' AND slot IN ('', '0') AND position_count > 0 AND NOT contains(dims, '[')
           GROUP BY module""",
        [run],
    ).to_pylist()
    return {row["module"].removeprefix("model."): row["features"] for row in rows}
