"""The SQL library: a small catalog in, the example of every object, CSV out (golden/sql)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tensorsleuth.analyze import sql_library
from tensorsleuth.analyze.scalar_functions import FUNCTIONS
from tensorsleuth.analyze.sql_library import objects, run_sql
from tensorsleuth.store import (
    FormatError,
    InputError,
    IntegrityError,
    Trace,
    catalog,
    site_name,
)

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "sql"
PAGE = (HERE.parent / "docs" / "sql.md").read_text()

# comparison, phase, exec_order, module: R over all prompts, of prompt 0, of prompt 1 (- undefined), state, verdict
MEASURED = """
port-1 prefill 0 model.embed_tokens        -    -    -   exact          pass
port-1 prefill 4 model.layers.0.mlp        1.0  1.0  1.1 measured       pass
port-1 prefill 8 model.layers.1.mlp        1.1  1.0  1.2 measured       pass
port-1 decode  8 model.layers.1.mlp        1.2  1.1  1.2 measured       undecided
port-2 prefill 0 model.embed_tokens        -    -    -   exact          pass
port-2 prefill 4 model.layers.0.mlp        1.0  0.9  1.1 measured       pass
port-2 prefill 7 model.layers.1.self_attn  inf  inf  -   baseline_exact fail
port-2 prefill 8 model.layers.1.mlp        4.4  2.0  6.6 measured       fail
port-2 decode  4 model.layers.0.mlp        1.5  1.5  1.5 measured       undecided
port-2 decode  8 model.layers.1.mlp        -    -    -   nonfinite      fail
"""
# run, rank, prompt, phase, step, exec_order, module, port, dims, checksum, mean, std, n_nan
RECORDED = """
fp32   0 0 prefill 0 0 model.embed_tokens b_s_h     aa  0.0 1.0 0
fp32   0 1 prefill 0 0 model.embed_tokens b_s_h     ab  0.1 1.1 0
fp32   0 0 prefill 0 4 model.layers.0.mlp b_s_h     ac  0.0 2.0 0
fp32   0 0 decode  1 4 model.layers.0.mlp b_s_h     ad  0.5 2.0 0
neuron 0 0 prefill 0 0 model.embed_tokens b_s_h     aa  0.0 1.0 0
neuron 1 0 prefill 0 0 model.embed_tokens b_s_h     aa  0.0 1.0 0
neuron 0 1 prefill 0 0 model.embed_tokens b_s_h     aa  0.0 1.0 0
neuron 0 0 prefill 0 4 model.layers.0.mlp b_s_h     ba  0.4 2.2 0
neuron 1 0 prefill 0 4 model.layers.0.mlp b_s_h     bb  0.4 2.2 0
neuron 0 0 prefill 0 5 model.layers.0.q   b_s_h[tp] bc  0.4 2.2 2
neuron 1 0 prefill 0 5 model.layers.0.q   b_s_h[tp] bd  0.4 2.2 0
neuron 0 0 decode  1 4 model.layers.0.mlp b_s_h     be  0.5 2.0 3
neuron 0 0 decode  2 0 model.embed_tokens b_s_h     bf  0.0 1.0 1
"""
DAY = datetime(2026, 3, 1)


def number(text: str) -> float | None:
    return None if text == "-" else float(text)


def fill(connection: Any) -> None:
    """A catalog of three runs and two comparisons, as small as every object of the library can be shown on."""
    for ordinal, (run, role, dtype) in enumerate(
        [("fp32", "reference", "float32"), ("bf16", "baseline", "bfloat16"), ("neuron", "target", "bfloat16")], 1
    ):
        tp = 2 if run == "neuron" else 1
        row = [run, ordinal, role, "hf", "tiny", dtype, "cpu", tp, "complete", DAY, "{}"]
        connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("INSERT INTO shards VALUES (?, 0, 's', 'runs/lost.h5', 0, '', 0, 'sealed')", [run])
    connection.execute("INSERT INTO prompts VALUES ('fp32', 0, 'short', 'Hi', 2), ('fp32', 1, 'long', 'Hi there', 3)")
    for day, (name, verdict) in enumerate([("port-1", "undecided"), ("port-2", "fail")], 2):
        row = [name, "fp32", "bf16", "neuron", name, "{}", DAY.replace(day=day), verdict, [], 3, 1, 1]
        connection.execute("INSERT INTO comparisons VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute(
            """INSERT INTO coverage VALUES
               ($1, 'model.embed_tokens', 'prefill', 0, 'matched', ''), ($1, 'lm_head', 'prefill', 12, 'unmatched',
               'no site of the target has its name'), ($1, 'model.rotary', '', 1, 'skipped', 'constant')""",
            [name],
        )
    numbers = count()
    for line in MEASURED.strip().splitlines():
        comparison, phase, order, module, *ratios, state, verdict = line.split()
        for prompt, r in zip((None, 0, 1), map(number, ratios), strict=True):
            measurement = next(numbers)
            connection.execute(
                """INSERT INTO measurements BY NAME SELECT ? AS comparison, ? AS measurement, ? AS site, site AS
                   target_site, site AS module, 'output' AS port, '' AS slot, 0 AS call, ? AS exec_order, ? AS phase,
                   ?::INTEGER AS prompt, 64 AS n, ?::DOUBLE AS r_ratio, r_ratio * 0.9 AS r_low, r_ratio * 1.25 AS
                   r_high, ? AS state, ? AS verdict""",
                [comparison, measurement, module, int(order), phase, prompt, r, state, verdict],
            )
            if (comparison, phase, module) == ("port-2", "prefill", "model.layers.1.mlp"):
                if prompt is not None:
                    connection.execute(
                        "INSERT INTO token_errors VALUES ($1, $2, 0, 1, 4, 100), ($1, $2, 1, 0, $3, 0)",
                        [comparison, measurement, 4.0 * prompt],
                    )
                else:
                    connection.execute(
                        "INSERT INTO error_quantiles VALUES ($1, $2, 0.9, 1, 4), ($1, $2, 0.1, -1, -5)",
                        [comparison, measurement],
                    )
    connection.execute(
        """INSERT INTO logits BY NAME SELECT 'port-2' AS comparison, unnest([0, 0, 1]) AS prompt, unnest([0, 1, 0]) AS
           position, 1.5 AS r_ratio, 0.99 AS cosine, unnest([0.5, 0.25, 0.125]) AS kl, unnest([true, false, true]) AS
           top1, 0.8 AS top5, 0.9 AS top10, unnest(['prefill', 'decode', 'prefill']) AS phase, 'measured' AS state,
           unnest(['pass', 'fail', 'pass']) AS verdict, 4 AS reference_norm, 2 AS baseline_error, 3 AS target_error,
           unnest([7, 7, 8]) AS reference_token, unnest([7, 9, 8]) AS target_token,
           unnest([0, 0.25, 0]) AS flip_expected, unnest([NULL, 1.5, NULL]) AS flip_sigma,
           unnest([1, 2, 1]) AS rank_reference_token,
           0 AS n_nonfinite_reference, 0 AS n_nonfinite_baseline, 0 AS n_nonfinite_target"""
    )
    connection.execute(
        """INSERT INTO findings BY NAME SELECT 'port-2' AS comparison, 1 AS rank, 'model.layers.1.self_attn' AS site,
           site AS target_site, 'prefill' AS phase, 'attention_scale' AS cause, 0.99 AS confidence, 'twice' AS summary,
           '{"explained": 0.999, "residual_ratio": 1.1, "runner_up": {"cause": "causal_mask", "explained": 0.1}}'
           AS evidence, 'once' AS remedy, 'attention-scale' AS entry, '' AS command"""
    )
    connection.execute(
        """INSERT INTO change_points VALUES ('port-2', 'prefill', 'step', 'model.layers.1.self_attn', 7,
           'model.layers.1.self_attn', 7, 'model.layers.1.mlp', 8, 0.0, ln(4.4))"""
    )
    connection.execute(
        """INSERT INTO measurements BY NAME SELECT 'port-3' AS comparison, 900 + i AS measurement, 'x' AS site, 'x' AS
           target_site, 'model.layers.1.mlp' AS module, ['input', 'output'][i] AS port, '' AS slot, 0 AS call, i AS
           exec_order, 'prefill' AS phase, 64 AS n, [1.0, 40][i] AS r_ratio, [0.001, 0.08][i] AS relative_l2,
           [0.001, 0.002][i] AS relative_l2_baseline, 'measured' AS state, ['pass', 'fail'][i] AS verdict
           FROM (SELECT unnest([1, 2]) AS i)"""
    )
    for seq, line in enumerate(RECORDED.strip().splitlines()):
        run, rank, prompt, phase, step, order, module, dims, checksum, mean, std, n_nan = line.split()
        connection.execute(
            """INSERT INTO tensors BY NAME SELECT ?::BIGINT AS tensor_id, ? AS run, ? AS rank, 's' AS shard, ? AS seq,
               ? AS prompt, ? AS phase, ? AS step, 0 AS call, ? AS exec_order, ? AS module, 'output' AS port,
               '' AS slot, ? AS dims, step AS position_start, 2 AS position_count, [1, 2, 4] AS shape, 'float32' AS
               dtype, 32 AS nbytes, 'd' AS dataset, 0 AS file_offset, false AS alias, ? AS checksum, ? AS mean,
               ? AS std, -3 AS min, 3 AS max, 3 AS absmax, ? AS n_nan, 0 AS n_inf, 0 AS n_zero""",
            [
                seq,
                run,
                rank,
                seq,
                prompt,
                phase,
                step,
                order,
                module,
                dims.replace("_", " "),
                checksum,
                mean,
                std,
                n_nan,
            ],
        )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    trace = Trace.create(tmp_path_factory.mktemp("small") / "trace")
    with catalog.writing(trace.catalog_path) as connection:
        fill(connection)
    return trace


def as_csv(table: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row)
    return text.getvalue()


@pytest.mark.parametrize("item", objects(), ids=lambda item: item.name)
def test_the_example_of_every_object_gives_its_golden_csv(item: Any, small: Trace) -> None:
    assert re.search(rf"\b{item.name}\b", item.example)
    assert as_csv(run_sql(small, item.example)) == (GOLDEN / f"{item.name}.csv").read_text()


def test_golden_files_belong_to_objects() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {item.name for item in objects()}


@contextmanager
def library(trace: Trace) -> Iterator[Any]:
    with catalog.reading(trace.catalog_path) as connection:
        sql_library.install(connection, temporary=True)
        yield connection


@pytest.mark.parametrize("item", objects(), ids=lambda item: item.name)
def test_headers_document_every_column_and_argument(item: Any, small: Trace) -> None:
    assert item.summary.endswith((".", "?"))
    with library(small) as connection:
        if item.kind == "scalar macro":
            return
        required = re.findall(r"[(,] ?(\w+)(?=[,)])", item.signature)
        call = item.name if item.kind == "view" else f"{item.name}({', '.join(repr('x') for _ in required)})"
        described = connection.execute(f"DESCRIBE SELECT * FROM {call}").fetchall()
    assert [(column.name, column.type) for column in item.columns] == [row[:2] for row in described]
    assert [argument.name for argument in item.arguments] == re.findall(r"[(,] ?(\w+)", item.signature)


VIEW = "CREATE VIEW ones AS SELECT 1 AS i;"


@pytest.mark.parametrize(
    ("filename", "text"),
    [
        ("other.sql", f"-- Ones.\n-- Columns:\n--   i INTEGER: one\n-- Example:\n--   FROM ones\n{VIEW}"),
        ("ones.sql", VIEW),
        ("ones.sql", f"-- Ones.\n-- Columns:\n--   i INTEGER one\n-- Example:\n--   FROM ones\n{VIEW}"),
        ("ones.sql", f"-- Ones.\n-- Columns:\n--   i INTEGER: one\n{VIEW}"),
    ],
    ids=["another name", "no header", "malformed column", "no example"],
)
def test_a_file_without_a_full_header_is_refused(filename: str, text: str) -> None:
    with pytest.raises(FormatError, match=filename):
        sql_library.parse_object(filename, text)


def test_the_library_can_be_stored_in_the_catalog_and_replaced(tmp_path: Path) -> None:
    trace = Trace.create(tmp_path / "trace")
    with catalog.writing(trace.catalog_path) as connection:
        fill(connection)
        sql_library.install(connection, temporary=False)
        sql_library.install(connection, temporary=False)
    assert trace.query("SELECT site FROM first_divergence WHERE overall AND comparison = 'port-2'").to_pylist() == [
        {"site": "model.layers.1.self_attn"}
    ]
    comments = trace.query("SELECT comment FROM duckdb_views() WHERE view_name = 'divergence'")
    assert comments.to_pylist()[0]["comment"].startswith("Every compared site in dataflow order")


@pytest.mark.parametrize("call", [0, 1, 12])
@pytest.mark.parametrize("slot", ["", "0", "past.0.key"])
@pytest.mark.parametrize("port", ["output", "input", "parameter"])
@pytest.mark.parametrize("module", ["", "model.layers.0"])
def test_site_name_is_the_one_of_the_store(small: Trace, module: str, port: str, slot: str, call: int) -> None:
    names = run_sql(small, f"SELECT site_name('{module}', '{port}', '{slot}', {call}) AS full")
    assert names.to_pylist() == [{"full": site_name(module, port, slot, call)}]


# Running statements


@pytest.mark.parametrize(
    "statement",
    [
        "WITH r AS (SELECT * FROM runs) SELECT count(*) FROM r",
        "FROM divergence LIMIT 1;",
        "DESCRIBE divergence",
        "SUMMARIZE runs",
        "SHOW TABLES",
        "PIVOT divergence ON phase USING max(r_ratio) GROUP BY site",
        "EXPLAIN FROM divergence",
        "VALUES (1)",
    ],
)
def test_statements_that_read_run(small: Trace, statement: str) -> None:
    assert run_sql(small, statement).num_rows > 0


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM runs", "DELETE is refused"),
        ("CREATE TEMP TABLE t AS SELECT 1", "CREATE is refused"),
        ("COPY runs TO 'stolen.csv'", "COPY is refused"),
        ("ATTACH 'other.duckdb'", "ATTACH is refused"),
        ("SET enable_external_access = true", "SET is refused"),
        ("INSTALL httpfs", "INSTALL or LOAD is refused"),
        ("EXPLAIN ANALYZE DELETE FROM runs", "read-only mode"),
        ("SELECT 1; DELETE FROM runs", "found 2"),
        ("CREATE TEMP TYPE x AS ENUM ('a'); SELECT 1", "found 2"),
        ("", "found 0"),
        ("SELEC 1", "syntax error"),
        ("SELECT nothing FROM runs", "nothing"),
        ("SELECT * FROM read_text('/etc/passwd')", "disabled by configuration"),
        ("SELECT * FROM '/etc/passwd'", "disabled by configuration|does not exist"),
    ],
)
def test_anything_else_is_one_clear_line(small: Trace, statement: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        run_sql(small, statement)
    assert "\n" not in str(raised.value)


def test_external_access_reads_files_and_still_writes_none(small: Trace, tmp_path: Path) -> None:
    (tmp_path / "expected.csv").write_text("site,limit\nmodel.layers.1.mlp,2\n")
    expected = f"'{tmp_path}/expected.csv'"
    joined = f"SELECT d.site FROM divergence d JOIN {expected} e ON d.site = e.site AND d.r_ratio > e.limit"
    assert run_sql(small, joined, external_access=True).num_rows == 1
    target = tmp_path / "out.csv"
    for write in ("COPY runs TO '{}'", "EXPLAIN ANALYZE COPY runs TO '{}'", "COPY (PIVOT runs ON dtype) TO '{}'"):
        with pytest.raises(InputError):
            run_sql(small, write.format(target), external_access=True)
    assert not target.exists()


# The reference page


def section(title: str) -> str:
    match = re.search(rf"^###? `{re.escape(title)}[`(].*?(?=^##)", PAGE + "\n##", re.MULTILINE | re.DOTALL)
    assert match, f"docs/sql.md has no section for {title}"
    return match[0]


def test_every_table_and_column_is_documented(small: Trace) -> None:
    tables = small.query(
        "SELECT table_name, list(column_name ORDER BY column_index) AS columns FROM duckdb_columns() "
        "WHERE NOT internal GROUP BY table_name"
    )
    for row in tables.to_pylist():
        documented = re.findall(r"^\| `(\w+)` \|", section(row["table_name"]), re.MULTILINE)
        assert documented == row["columns"], row["table_name"]


def test_every_object_and_function_is_documented() -> None:
    for item in objects():
        text = section(item.name)
        assert f"`{item.signature}`" in text
        for column in item.columns:
            if item.kind != "scalar macro":
                assert f"| `{column.name}` | {column.type} |" in text
    for function in FUNCTIONS:
        assert f"| `{function.signature}` |" in PAGE


@pytest.mark.parametrize("query", re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_every_query_of_the_page_runs(small: Trace, query: str) -> None:
    with suppress(IntegrityError):  # the small catalog names a shard that does not exist
        run_sql(small, query)
