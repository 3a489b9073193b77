"""What every importer works with: the files of a dump, what was found in them, and what becomes of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...store.errors import InputError
from ...store.manifest import Prompt, PromptTokens
from ..layout import StepLayout
from .reading import SUFFIXES, FileRefusedError, check_tensor, read_tensors

#: Longest module path or slot that is taken over from a dump.
NAME_LENGTH = 255
_PICKLES = (".pkl", ".pickle", ".joblib")


@dataclass(frozen=True)
class DumpFile:
    """A regular file of a dump: where it is, and its name relative to the dump with `/` between folders."""

    path: Path
    name: str


@dataclass
class Report:
    """What an import has to say; each line names a file or a site.

    Attributes:
        skipped: what was left out, `{file: reason}`.
        notes: what was imported but needs a word, `{file or site: note}`.
        assumptions: what was inferred or assumed about the whole dump.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    def skip(self, file: str, reason: str, slot: str = "") -> None:
        """Leave a file, or one tensor of it, out."""
        self.skipped.setdefault(_where(file, slot), reason)

    def note(self, file: str, text: str, slot: str = "") -> None:
        """Say something about what is imported."""
        self.notes.setdefault(_where(file, slot), text)

    def assume(self, text: str) -> None:
        """Record an assumption once."""
        if text not in self.assumptions:
            self.assumptions.append(text)


@dataclass(frozen=True)
class Planned:
    """One tensor of a file and its place in the run.

    Attributes:
        file: the file.
        key: slot of the tensor within the file, empty for a bare tensor.
        shape: as it was when the dump was surveyed.
        dtype: torch name.
        module, port, slot: its site.
        phase: `prefill`, `decode` or `forward`.
        step: 0 for prefill, then decode steps.
        order: place in the order of execution.
        prompt: index of the prompt, for tensors without a layout.
        layout: tokens of the forward pass, None when positions are unknown.
        last_only: a token axis of length one stands for the last token.
        sharded: the axis that is split over ranks: `s` (positions), `features`, or empty.
        rank: tensor-parallel rank.
        dims: its axes before they are marked as sharded, None to infer them from the layout.
        copies: consecutive ranks that hold the same shard.
    """

    file: DumpFile
    key: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    port: str
    slot: str
    phase: str
    step: int
    order: int
    prompt: int | None
    layout: StepLayout | None
    last_only: bool = False
    sharded: str = ""
    rank: int = 0
    dims: str | None = None
    copies: int = 1


@dataclass(frozen=True)
class Plan:
    """A surveyed dump, ready to be written.

    Attributes:
        stack: what made the tensors, as runs name it.
        tensors: everything to import.
        tp: tensor-parallel degree.
        prompts, tokens: empty when the tokens are unknown.
    """

    stack: str
    tensors: list[Planned]
    tp: int = 1
    prompts: tuple[Prompt, ...] = ()
    tokens: tuple[PromptTokens, ...] = ()


def shown(name: str, limit: int = 160) -> str:
    """A name from a dump, safe to print: control characters escaped, cut to a length."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= limit else f"{text[:limit]}... ({len(name)} characters)"


def _where(file: str, slot: str) -> str:
    return f"{shown(file)}[{shown(slot)}]" if slot else shown(file)


def name_fault(name: str) -> str | None:
    """Why a name cannot be a module path or slot, or None. Names are data: they never become paths."""
    if len(name) > NAME_LENGTH:
        return f"its name has {len(name)} characters, at most {NAME_LENGTH} are taken over"
    if not name.isprintable():
        return "its name holds control characters or is not text"
    if "/" in name or "\\" in name or name in (".", ".."):
        return "its name is a path; a module path has dots, for example layers.0.mlp"
    return None


def list_files(source: Path, report: Report) -> list[DumpFile]:
    """The tensor files of a dump, by name; what is no regular file inside the dump is reported.

    Raises:
        InputError: there is no such file or folder.
    """
    if source.is_file():
        return [DumpFile(source, source.name)]
    if not source.is_dir():
        raise InputError(f"{source} does not exist; name the folder (or file) that holds the dumped tensors")
    found = []
    for folder, folders, names in os.walk(source):
        folders.sort()
        for linked in (name for name in folders if Path(folder, name).is_symlink()):
            report.skip(Path(folder, linked).relative_to(source).as_posix(), "is a link to a folder, not followed")
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(source).as_posix()
            if path.suffix in _PICKLES:
                report.skip(relative, "is a pickle, which is never opened; save tensors with torch.save as .pt")
            if path.suffix not in SUFFIXES:
                continue
            fault = _file_fault(path, source)
            if fault is None:
                found.append(DumpFile(path, relative))
            else:
                report.skip(relative, fault)
    return found


def _file_fault(path: Path, source: Path) -> str | None:
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(source.resolve()):
            return "is a link that leaves the dump"
        status = path.stat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    return "is empty (0 bytes)" if status.st_size == 0 else None


def tensors_of(file: DumpFile, report: Report) -> Iterator[tuple[str, torch.Tensor]]:
    """The usable tensors of a file with their slots, mapped; everything else about it is reported."""
    try:
        for slot, tensor in read_tensors(file.path):
            fault = name_fault(slot) or fault_of(lambda tensor=tensor: check_tensor(tensor))  # type: ignore[misc]
            if fault is None:
                yield slot, tensor
            else:
                report.skip(file.name, fault, slot)
    except FileRefusedError as error:
        report.skip(file.name, str(error))


def fault_of(check: Callable[[], None]) -> str | None:
    """The message of the error that a check raises, or None."""
    try:
        check()
    except InputError as error:
        return str(error)
    return None


def dtype_of(tensor: torch.Tensor) -> str:
    """The torch name of a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")
