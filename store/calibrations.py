"""Calibrations on disk: one JSON file each in the trace's folder `calibrations/`; the catalog's table follows them."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import catalog
from .errors import FormatError, InputError
from .manifest import check_run_name
from .trace import Trace

FOLDER = "calibrations"
FORMAT, VERSION = "tensorsleuth-calibration", 1


def write_calibration(trace: Trace, name: str, fields: dict[str, Any]) -> Path:
    """Keep a calibration, replacing an earlier one of the same name, and enter it into the catalog.

    Args:
        trace: the trace.
        name: a name as runs have them.
        fields: JSON-ready; `thresholds`, `sources` and `created_at` (ISO 8601) become columns of the catalog.

    Returns:
        The file.

    Raises:
        InputError: the name cannot be used.
    """
    path = trace.path / FOLDER / f"{check_run_name(name)}.json"
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=1))
    fresh.replace(path)
    with catalog.writing(trace.catalog_path) as connection:
        enter_calibrations(connection, trace)
    return path


def read_calibration(trace: Trace, name: str) -> dict[str, Any]:
    """The fields of a calibration.

    Raises:
        InputError: the trace has none of this name.
        FormatError: its file cannot be read.
    """
    path = trace.path / FOLDER / f"{check_run_name(name)}.json"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in _files(trace))) or "none"
        raise InputError(
            f"{trace.path} has no calibration {name!r}; its calibrations: {known}; make one with 'sleuth calibrate'"
        )
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise FormatError(f"{path} is no JSON ({error}); make the calibration anew with 'sleuth calibrate'") from error
    if not isinstance(fields, dict) or (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
        raise FormatError(f"{path} is no calibration of version {VERSION}; make it anew with 'sleuth calibrate'")
    return fields


def enter_calibrations(connection: Any, trace: Trace) -> None:
    """Enter what the files say into the catalog, in place of what it said of them."""
    rows = [(path.stem, read_calibration(trace, path.stem)) for path in _files(trace)]
    connection.execute("DELETE FROM calibrations WHERE calibration IN (SELECT unnest(?))", [[name for name, _ in rows]])
    stamps = [datetime.fromisoformat(fields["created_at"]).astimezone(timezone.utc) for _, fields in rows]
    catalog.insert(
        connection,
        "calibrations",
        {
            "calibration": [name for name, _ in rows],
            "thresholds": [json.dumps(fields["thresholds"]) for _, fields in rows],
            "sources": [json.dumps(fields["sources"]) for _, fields in rows],
            "created_at": [stamp.replace(tzinfo=None) for stamp in stamps],
        },
    )


def _files(trace: Trace) -> list[Path]:
    return sorted((trace.path / FOLDER).glob("[!.]*.json"))
