"""The run manifest: everything about a run but its tensors, as `run.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import FormatError, InputError, StorageError, TraceNotFoundError
from .index import FORMAT_VERSION

ROLES = ("reference", "baseline", "target")
STATUSES = ("running", "complete", "failed", "repaired")
#: Key of a run's provenance: for every prompt, the tokens that the encoder of an encoder-decoder read.
ENCODER_TOKENS = "encoder_tokens"
#: Phase of what an encoder computes: its positions are those of these tokens.
ENCODE = "encode"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,63}")
_FILE = "run.json"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt: index within the run.
        id: the user's name for it, or the index as text.
        text: its text, None when it was given as token ids.
        n_tokens: length in tokens, before anything was generated.
    """

    prompt: int
    id: str
    text: str | None
    n_tokens: int


@dataclass(frozen=True)
class PromptTokens:
    """The token at every position of one prompt.

    Attributes:
        prompt: index within the run.
        token_ids: prompt tokens, then the tokens fed at decode steps.
        forced_from: first position whose token another run dictated (teacher forcing), None when free-running.
    """

    prompt: int
    token_ids: tuple[int, ...]
    forced_from: int | None = None


@dataclass(frozen=True)
class Module:
    """One module of the recorded model, in execution order (-1 when its hook never fired)."""

    path: str
    cls: str
    parent: str | None
    depth: int
    exec_order: int
    n_parameters: int


@dataclass(frozen=True)
class RunManifest:
    """Provenance and structure of one run; see DESIGN's `runs`, `prompts`, `tokens` and `modules` tables.

    Attributes:
        ordinal: position of the run in its trace, from 1; tensor ids are built on it.
        provenance: versions, flags, weights fingerprint, host, plan, observer effect, ... (JSON-ready).
    """

    ordinal: int
    run: str
    role: str
    stack: str
    model: str
    dtype: str
    device: str
    tp: int
    status: str
    created_at: str
    provenance: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    tokens: tuple[PromptTokens, ...] = ()
    modules: tuple[Module, ...] = ()

    def to_json(self) -> bytes:
        """JSON bytes, stable for equal content."""
        body = {"format": "tensorsleuth-run", "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(body, ensure_ascii=False, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, source: str) -> RunManifest:
        """Parse a manifest.

        Args:
            data: JSON bytes.
            source: named in error messages.

        Raises:
            FormatError: not a manifest of this format version.
        """
        try:
            body = json.loads(data)
            if body["format"] != "tensorsleuth-run" or body["version"] != FORMAT_VERSION:
                raise FormatError(
                    f"{source} has format {body['format']} version {body['version']}, this tensorsleuth reads "
                    f"tensorsleuth-run version {FORMAT_VERSION}; use the version that wrote it"
                )
            del body["format"], body["version"]
            body["prompts"] = tuple(Prompt(**item) for item in body["prompts"])
            body["tokens"] = tuple(
                PromptTokens(**{**item, "token_ids": tuple(item["token_ids"])}) for item in body["tokens"]
            )
            body["modules"] = tuple(Module(**item) for item in body["modules"])
            return cls(**body)
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{source} is not a run manifest ({error}); run 'sleuth repair' on the trace") from error


def check_run_name(name: str) -> str:
    """Return the name if it can be a folder name.

    Raises:
        InputError: it cannot.
    """
    if not _RUN_NAME.fullmatch(name):
        raise InputError(
            f"run name {name!r} is not usable; use up to 64 letters, digits, '.', '_' and '-', starting with a "
            "letter or digit"
        )
    return name


def write_manifest(folder: Path, manifest: RunManifest) -> None:
    """Replace `run.json` atomically and durably.

    Raises:
        StorageError: the operating system refused to write.
    """
    temporary = folder / f"{_FILE}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / _FILE)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{folder / _FILE} cannot be written: {error.strerror or error}; free space, then 'sleuth repair'"
        ) from error


def read_manifest(folder: Path) -> RunManifest:
    """Read the `run.json` of a run's folder.

    Raises:
        TraceNotFoundError: there is none.
        FormatError: it is not of this format version.
    """
    path = folder / _FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TraceNotFoundError(f"{path} does not exist; 'sleuth repair' restores it from the shards") from None
    return RunManifest.from_json(data, str(path))
