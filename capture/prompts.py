"""Prompts: from text, from a file, as token ids, or from another run of the trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..store.errors import InputError
from ..store.manifest import ENCODER_TOKENS, RunManifest


@dataclass(frozen=True)
class PromptInput:
    """A prompt as the user gave it: text or token ids.

    Attributes:
        id: the user's name for it.
        text: its text, or
        token_ids: its tokens; in an encoder-decoder, those that the encoder reads.
        decoder_ids: what the decoder of an encoder-decoder begins with, None for the model's start token.
    """

    id: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    decoder_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready to run.

    Attributes:
        id: the user's name for it.
        text: its text, None when it was given as token ids.
        token_ids: prompt tokens.
        forced: tokens to feed after the prompt (teacher forcing); the last one is never fed.
        source_ids: what the encoder of an encoder-decoder reads; the other tokens are its decoder's.
    """

    id: str
    text: str | None
    token_ids: tuple[int, ...]
    forced: tuple[int, ...] | None = None
    source_ids: tuple[int, ...] | None = None


def read_prompts(path: Path) -> list[PromptInput]:
    """Read a prompts file: JSONL with `text` or `token_ids` (and optionally `id`), or `.txt` with one prompt a line.

    Raises:
        InputError: the file is missing, empty, or a line cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts file {path} cannot be read: {error}") from error
    parse = _parse_text if path.suffix == ".txt" else _parse_json
    prompts = [parse(line, number, path) for number, line in enumerate(lines) if line.strip()]
    if not prompts:
        raise InputError(f'prompts file {path} is empty; write one object per line, for example {{"text": "Once"}}')
    duplicates = sorted({p.id for p in prompts if sum(p.id == other.id for other in prompts) > 1})
    if duplicates:
        raise InputError(f"prompts file {path} uses id {duplicates[0]!r} twice; ids must differ")
    return prompts


def _parse_text(line: str, number: int, path: Path) -> PromptInput:
    return PromptInput(str(number), text=line)


def _parse_json(line: str, number: int, path: Path) -> PromptInput:
    where = f"{path}:{number + 1}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); a file of plain text lines must be named *.txt") from error
    if not isinstance(value, dict) or ("text" in value) == ("token_ids" in value):
        raise InputError(f'{where} needs either "text" or "token_ids"')
    name = str(value.get("id", number))
    decoder_ids = _ids(value, "decoder_ids", where) if "decoder_ids" in value else None
    if "text" in value:
        if not isinstance(value["text"], str):
            raise InputError(f'{where}: "text" must be a string')
        return PromptInput(name, text=value["text"], decoder_ids=decoder_ids)
    return PromptInput(name, token_ids=_ids(value, "token_ids", where), decoder_ids=decoder_ids)


def _ids(value: dict[str, object], key: str, where: str) -> tuple[int, ...]:
    ids = value[key]
    if not isinstance(ids, list) or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise InputError(f'{where}: "{key}" must be a list of integers')
    return tuple(ids)


def encode_prompts(
    prompts: Sequence[PromptInput],
    tokenize: Callable[[str], list[int]] | None,
    *,
    vocabulary: int | None,
    start: int | None = None,
) -> list[EncodedPrompt]:
    """Turn prompts into token ids.

    Args:
        prompts: as the user gave them.
        tokenize: text to token ids; None when the model has no tokenizer.
        vocabulary: number of token ids the model knows, None to skip the check.
        start: token that the decoder of an encoder-decoder begins with, None for other models.

    Raises:
        InputError: a prompt is empty, out of the vocabulary, or text without a tokenizer.
    """
    encoded = []
    for prompt in prompts:
        if prompt.token_ids is not None:
            ids = list(prompt.token_ids)
        elif tokenize is None:
            raise InputError(
                f"prompt {prompt.id!r} is text, but the model folder has no tokenizer; give token_ids in a prompts file"
            )
        else:
            ids = tokenize(prompt.text or "")
        if not ids:
            raise InputError(f"prompt {prompt.id!r} has no tokens; give it at least one")
        begin = (prompt.decoder_ids or (start,)) if start is not None else prompt.decoder_ids or ()
        if begin and start is None:
            raise InputError(f"prompt {prompt.id!r} has decoder_ids, but the model has no encoder; leave them out")
        known = (*ids, *begin)
        wrong = [token for token in known if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if wrong:
            raise InputError(
                f"prompt {prompt.id!r} holds token id {wrong[0]}, the model knows 0..{(vocabulary or 0) - 1}"
            )
        if begin:
            encoded.append(EncodedPrompt(prompt.id, prompt.text, begin, source_ids=tuple(ids)))
        else:
            encoded.append(EncodedPrompt(prompt.id, prompt.text, tuple(ids)))
    return encoded


def teacher_prompts(teacher: RunManifest) -> list[EncodedPrompt]:
    """The prompts of another run, each with the tokens that run went on with.

    Raises:
        InputError: the run has no prompts.
    """
    tokens = {item.prompt: item.token_ids for item in teacher.tokens}
    if not teacher.prompts or not tokens:
        raise InputError(f"run {teacher.run!r} has no tokens to follow; choose a run that generated text")
    sources = [tuple(ids) for ids in teacher.provenance.get(ENCODER_TOKENS, ())]
    return [
        EncodedPrompt(
            p.id,
            p.text,
            tokens[p.prompt][: p.n_tokens],
            tokens[p.prompt][p.n_tokens :],
            sources[p.prompt] if sources else None,
        )
        for p in teacher.prompts
        if p.prompt in tokens
    ]


def source_facts(prompts: Sequence[EncodedPrompt]) -> dict[str, list[list[int]]]:
    """What a run's provenance keeps of prompts: the tokens that the encoder read, by prompt; empty without encoder."""
    sources = [list(prompt.source_ids) for prompt in prompts if prompt.source_ids is not None]
    return {ENCODER_TOKENS: sources} if sources else {}


def check_lengths(prompts: Sequence[EncodedPrompt], new_tokens: int, limit: int | None) -> None:
    """Refuse prompts that, with their continuation, exceed the model's positions.

    Raises:
        InputError: naming the first prompt that is too long.
    """
    for prompt in prompts:
        fed = len(prompt.token_ids) + max(len(prompt.forced) if prompt.forced is not None else new_tokens, 1) - 1
        if limit is not None and fed > limit:
            raise InputError(
                f"prompt {prompt.id!r} needs {fed} positions ({len(prompt.token_ids)} tokens and their continuation), "
                f"the model has {limit}; shorten it or generate less"
            )
