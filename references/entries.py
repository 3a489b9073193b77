"""Reading the entries of the knowledge base."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..store.errors import FormatError, InputError

_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_FIELD = re.compile(r"(?P<name>[a-z]+): (?P<text>\S.*)")
_REQUIRED = ("title", "symptom", "cause", "remedy")
_OPTIONAL = ("misread", "log", "sample", "finding")
#: Fields that may stand more than once.
_REPEATED = ("log", "sample")


@dataclass(frozen=True)
class Entry:
    """One thing that goes wrong.

    Attributes:
        id: its name, words joined by hyphens.
        area: the file it stands in: attention, capture, compilation, ...
        title: one line.
        symptom: what is seen.
        cause: why.
        remedy: what to do.
        misread: a wrong explanation that is often given, or empty.
        logs: patterns of log lines by which it is recognised.
        samples: a line for each pattern.
        findings: causes of `sleuth diagnose` that this entry explains.
    """

    id: str
    area: str
    title: str
    symptom: str
    cause: str
    remedy: str
    misread: str
    logs: tuple[re.Pattern[str], ...]
    samples: tuple[str, ...]
    findings: tuple[str, ...]


@cache
def entries() -> dict[str, Entry]:
    """All entries by id, area by area.

    Raises:
        FormatError: an entry is malformed, or an id occurs twice.
    """
    found: dict[str, Entry] = {}
    pages = (path for path in files(__package__).iterdir() if path.name.endswith(".md"))
    for path in sorted(pages, key=lambda path: path.name):
        for item in parse(path.name.removesuffix(".md"), path.read_text(encoding="utf-8")):
            if item.id in found:
                raise FormatError(f"references/{path.name}: {item.id!r} is in {found[item.id].area}.md as well")
            found[item.id] = item
    return found


def entry(name: str) -> Entry:
    """The entry of an id, or of a cause that `sleuth diagnose` names.

    Raises:
        InputError: there is none; the message lists similar ones.
    """
    known = entries()
    if name in known:
        return known[name]
    explaining = [item for item in known.values() if name in item.findings]
    if explaining:
        return explaining[0]
    close = difflib.get_close_matches(name.replace("_", "-"), known, n=3)
    hint = f"close ones: {', '.join(close)}" if close else "'sleuth kb list' lists them"
    raise InputError(f"the knowledge base has no entry {name!r}; {hint}")


def parse(area: str, text: str) -> list[Entry]:
    """Read one file of entries.

    Args:
        area: the file's name without ending.
        text: its content: a heading, then entries that start with `## id`, each field on a line of its own.

    Raises:
        FormatError: with the line at fault.
    """
    parsed: list[Entry] = []
    current: tuple[str, dict[str, list[str]]] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("## "):
            if current is not None:
                parsed.append(_entry(area, *current))
            name = line.removeprefix("## ").strip()
            if not _ID.fullmatch(name):
                raise FormatError(f"references/{area}.md:{number}: {name!r} is not words joined by hyphens")
            current = name, {}
        elif line.strip() and not line.startswith("# "):
            match = _FIELD.fullmatch(line)
            if match is None or current is None or match["name"] not in (*_REQUIRED, *_OPTIONAL):
                raise FormatError(f"references/{area}.md:{number}: expected 'field: text', found {line[:60]!r}")
            values = current[1].setdefault(match["name"], [])
            if values and match["name"] not in _REPEATED:
                raise FormatError(f"references/{area}.md:{number}: {match['name']} is given twice")
            values.append(match["text"].strip())
    if current is not None:
        parsed.append(_entry(area, *current))
    return parsed


def _entry(area: str, name: str, fields: dict[str, list[str]]) -> Entry:
    lacking = [field for field in _REQUIRED if field not in fields]
    if lacking:
        raise FormatError(f"references/{area}.md: {name} has no {', '.join(lacking)}")
    logs, samples = fields.get("log", []), tuple(fields.get("sample", []))
    if len(logs) != len(samples):
        raise FormatError(f"references/{area}.md: {name} has {len(logs)} log patterns and {len(samples)} samples")
    try:
        patterns = tuple(re.compile(pattern) for pattern in logs)
    except re.error as error:
        raise FormatError(f"references/{area}.md: {name}: the log pattern is no regular expression: {error}") from error
    text = {field: fields.get(field, [""])[0] for field in (*_REQUIRED, "misread", "finding")}
    return Entry(
        name, area, text["title"], text["symptom"], text["cause"], text["remedy"], text["misread"], patterns, samples,
        tuple(text["finding"].split()),
    )  # fmt: skip
