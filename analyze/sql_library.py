"""The SQL standard library: views and macros over the catalog, and running a query with all of them in reach.

Each object is one file under `sql/`, whose header states its purpose, arguments, output columns with types and
units, and an example. The header is parsed here; a test holds it against what DuckDB says about the object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from importlib.resources import files
from typing import Any

import duckdb
import pyarrow as pa

from ..store import FormatError, InputError, Trace
from ..store.catalog import reading
from .scalar_functions import tensor_functions

_CREATE = re.compile(r"^CREATE (?P<kind>VIEW|MACRO) (?P<name>\w+)(?P<parameters>\([^)]*\))?\s+AS(?P<table>\s+TABLE)?\b")
_CREATE_AGAIN = re.compile(r"\ACREATE ")
_SECTION = re.compile(r"(Arguments|Columns|Returns|Example):")
_COLUMN = re.compile(r"  (?P<name>\w+)(?: (?P<type>[A-Z][A-Z0-9]*(?:\[\])?))?: (?P<meaning>.+)")
_RETURNS = re.compile(r"  (?P<type>[A-Z]+): (?P<meaning>.+)")
#: Statements that cannot write. Two more cannot while there is nothing to write to, that is without external access:
#: EXPLAIN ANALYZE runs what it explains, and MULTI is a PIVOT, perhaps inside a COPY.
_READS = {"SELECT"}
_READS_INSIDE = {"SELECT", "EXPLAIN", "MULTI"}
_SPELLED = {"MULTI": "PIVOT", "LOAD": "INSTALL or LOAD"}


@dataclass(frozen=True)
class SqlColumn:
    """An output column, or an argument of a macro.

    Attributes:
        name: its name; `value` for what a scalar macro returns.
        type: DuckDB type; empty for arguments.
        meaning: what it holds, with its unit.
    """

    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class SqlObject:
    """A view or macro of the library.

    Attributes:
        name: as used in a query.
        kind: `view`, `table macro` or `scalar macro`.
        summary: what it answers.
        arguments: of a macro, in order.
        columns: what comes out, in order.
        example: a query that uses it.
        sql: the statement that creates it, without header.
    """

    name: str
    kind: str
    summary: str
    arguments: tuple[SqlColumn, ...]
    columns: tuple[SqlColumn, ...]
    example: str
    sql: str

    @property
    def signature(self) -> str:
        """The name with its parameters: `qq(wanted, comparison := NULL, prompt := NULL)`."""
        match = _CREATE.match(self.sql)
        return self.name + ((match and match["parameters"]) or "")


@cache
def objects() -> list[SqlObject]:
    """Every object of the library, in an order in which they can be created.

    Raises:
        FormatError: a file has no well-formed header.
    """
    found = {}
    for file in files(__package__).joinpath("sql").iterdir():
        if file.name.endswith(".sql"):
            parsed = parse_object(file.name, file.read_text(encoding="utf-8"))
            found[parsed.name] = parsed
    return [found[name] for name in _by_dependency({name: item.sql for name, item in found.items()})]


def install(connection: Any, *, temporary: bool) -> None:
    """Create the library.

    Args:
        connection: DuckDB connection to a catalog.
        temporary: create it for this connection only, which a read-only catalog allows; otherwise store it in
            the catalog, replacing what is there.
    """
    scope = "TEMP " if temporary else ""
    connection.execute("\n".join(_CREATE_AGAIN.sub(f"CREATE OR REPLACE {scope}", item.sql) for item in objects()))
    for item in objects():
        what = {"view": "VIEW", "table macro": "MACRO TABLE", "scalar macro": "MACRO"}[item.kind]
        summary = item.summary.replace("'", "''")
        connection.execute(f"COMMENT ON {what} {item.name} IS '{summary}'")


def run_sql(trace: Trace, statement: str, parameters: Sequence[Any] = (), *, external_access: bool = False) -> pa.Table:
    """Run one query over a trace: its catalog read-only, the library, and functions of stored tensors.

    Args:
        trace: an open trace.
        statement: a single statement that reads: SELECT, FROM, WITH, DESCRIBE, SUMMARIZE, PIVOT, EXPLAIN, ...
        parameters: values of its `?` placeholders.
        external_access: let the statement read files and the network.

    Returns:
        Its rows.

    Raises:
        InputError: the statement is not SQL, is more than one, would write, or fails.
        TraceNotFoundError, CatalogLockedError, FormatError: see `store.catalog.reading`.
        SleuthError: values that a function asked for cannot be read; see `scalar_functions`.
    """
    with (
        reading(trace.catalog_path, external_access=external_access) as connection,
        tensor_functions(connection, trace) as functions,
    ):
        install(connection, temporary=True)
        connection.execute("SET lock_configuration = true")
        try:
            _check_reads(connection, statement, external_access=external_access)
            return connection.sql(statement, params=list(parameters)).to_arrow_table()
        except duckdb.Error as error:
            if functions.failure is not None:
                raise functions.failure from error
            raise InputError(f"SQL: {str(error).strip().splitlines()[0]}; 'sleuth sql --list' names tables") from error


def parse_object(filename: str, text: str) -> SqlObject:
    """Parse a file of the library.

    Args:
        filename: its name, `<object>.sql`.
        text: header comment and CREATE statement.

    Raises:
        FormatError: the header lacks a part, or the statement creates something else.
    """
    lines = text.splitlines()
    header = [line[2:].removeprefix(" ") for line in lines if line.startswith("--")]
    sql = "\n".join(line for line in lines if not line.startswith("--")).strip()
    create = _CREATE.match(sql)
    if create is None or f"{create['name']}.sql" != filename:
        raise FormatError(f"{filename} must hold one 'CREATE VIEW' or 'CREATE MACRO' of the object it is named after")
    kind = "view" if create["kind"] == "VIEW" else "table macro" if create["table"] else "scalar macro"
    sections: dict[str, list[str]] = {"Summary": []}
    section = "Summary"
    for line in header:
        if heading := _SECTION.fullmatch(line):
            section = heading[1]
            sections[section] = []
        elif line.strip():
            sections[section].append(line)
    output = "Returns" if kind == "scalar macro" else "Columns"
    for name in ("Summary", output, "Example"):
        if not sections.get(name):
            raise FormatError(f"{filename} has no section {name!r} in its header comment")
    return SqlObject(
        name=create["name"],
        kind=kind,
        summary=" ".join(sections["Summary"]),
        arguments=_columns(filename, sections.get("Arguments", []), _COLUMN),
        columns=_columns(filename, sections[output], _RETURNS if output == "Returns" else _COLUMN),
        example="\n".join(line.removeprefix("  ") for line in sections["Example"]),
        sql=sql,
    )


def _columns(filename: str, lines: list[str], pattern: re.Pattern[str]) -> tuple[SqlColumn, ...]:
    columns = []
    for line in lines:
        match = pattern.fullmatch(line)
        if match is None:
            raise FormatError(f"{filename}: write '  name TYPE: meaning, unit' on one line, not {line!r}")
        groups = match.groupdict()
        columns.append(SqlColumn(groups.get("name", "value"), groups["type"] or "", groups["meaning"]))
    return tuple(columns)


def _by_dependency(statements: Mapping[str, str]) -> list[str]:
    """Names, each after those that its statement mentions; alphabetical otherwise."""
    uses = {
        name: sorted(set(re.findall(r"\w+", sql)) & set(statements) - {name})
        for name, sql in sorted(statements.items())
    }
    return list(TopologicalSorter(uses).static_order())


def _check_reads(connection: Any, text: str, *, external_access: bool) -> None:
    """Refuse anything but one statement that reads; the read-only catalog is the second line of defence."""
    statements = connection.extract_statements(text)
    kinds = [str(statement.type).rpartition(".")[2].partition(":")[0] for statement in statements]
    if kinds == ["CREATE", "SELECT"] and not any(statement.query for statement in statements):
        kinds = ["MULTI"]  # so a PIVOT looks before DuckDB 2.0
    if len(kinds) != 1:
        raise InputError(f"expected one SQL statement, found {len(kinds)}; run them one by one")
    if kinds[0] not in (_READS if external_access else _READS_INSIDE):
        where = " with external access" if kinds[0] in _READS_INSIDE else ""
        raise InputError(f"{_SPELLED.get(kinds[0], kinds[0])} is refused{where}: a trace is only read; write a SELECT")
