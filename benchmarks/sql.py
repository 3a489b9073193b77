"""How fast the library answers: `divergence` and `first_divergence` over a million measurements, against plain scans.

    python benchmarks/sql.py [--rows 1000000] [--prompts 9] [--repeat 5]

The measurements: 10 comparisons of 2 phases, one row per site over all prompts and one per prompt, as many sites as
it takes; 1 % of the sites fail. Every statement's rows are fetched into Arrow; the best of the repeats counts, and the
statements take turns, so that they share the machine's bad moments. The scans touch the columns that the view touches,
over the same rows, with no more than the filter on the comparison:

    aggregate      one min or max of every column; nothing leaves DuckDB
    materialise    the rows over all prompts, fetched: what the answer's columns cost before any order or verdict
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorsleuth.analyze.sql_library import install
from tensorsleuth.store import catalog

LIMIT = 10.0
COMPARISONS, PHASES = 10, 2
FIRST = "comparison phase exec_order measurement site r_ratio r_low r_high state verdict prompt"
ALL = FIRST + " target_site n relative_l2 q_value"

FILL = """
INSERT INTO measurements BY NAME
SELECT 'comparison-' || c AS comparison, (p * $sites + s) * ($prompts + 1) + k AS measurement,
    'model.layers.' || s // 40 || '.mlp.component_' || s % 40 AS site, 'port.' || site AS target_site, site AS module,
    'output' AS port, '' AS slot, 0 AS call, s AS exec_order, ['prefill', 'decode'][p + 1] AS phase,
    CASE WHEN k > 0 THEN k - 1 END AS prompt, 65536 AS n, 100.0 AS reference_norm, 0.1 AS baseline_error,
    0.1 * r_ratio AS target_error, r_ratio, r_ratio * 0.95 AS r_low, r_ratio * 1.05 AS r_high,
    1e-3 * r_ratio AS relative_l2, 1e-3 AS relative_l2_baseline, 0.999 AS cosine,
    random() AS max_abs_error, random() AS linf_ratio, random() AS sigma_ratio, random() AS qq_w1,
    'measured' AS state, CASE WHEN fails THEN 'fail' ELSE 'pass' END AS verdict
FROM (SELECT c, p, s, k, hash(c, p, s) % 100 = 0 AS fails, (0.9 + 0.2 * random()) * (1 + fails::INTEGER) AS r_ratio
      FROM range($comparisons) a(c), range($phases) b(p), range($sites) d(s), range($prompts + 1) e(k))
"""


def fill(connection: Any, rows: int, prompts: int) -> int:
    """Synthetic measurements; returns how many."""
    sites = rows // (COMPARISONS * PHASES * (prompts + 1))
    values = {"sites": sites, "prompts": prompts, "comparisons": COMPARISONS, "phases": PHASES}
    connection.execute(FILL, values)
    return sites * COMPARISONS * PHASES * (prompts + 1)


def statements(view: str, columns: Sequence[str], where: str) -> dict[str, str]:
    """The view and the scans that it is held against."""
    extremes = ", ".join(f"max({column})" for column in columns)
    return {
        view: f"FROM {view} WHERE {where}",
        "aggregate": f"SELECT {extremes} FROM measurements WHERE {where}",
        "materialise": f"SELECT {', '.join(columns)} FROM measurements WHERE {where} AND prompt IS NULL",
    }


def best_times(connection: Any, queries: dict[str, str], repeat: int) -> dict[str, tuple[float, int]]:
    """Seconds and rows per query."""
    best: dict[str, tuple[float, int]] = {}
    for _ in range(repeat + 1):
        for name, query in queries.items():
            start = time.perf_counter()
            rows = connection.sql(query).to_arrow_table().num_rows
            seconds = time.perf_counter() - start
            best[name] = (min(seconds, best.get(name, (seconds, 0))[0]), rows)
    return best


def main() -> int:
    """Print the table; 1 if a view takes more than `LIMIT` times the aggregate scan of its rows."""
    parser = argparse.ArgumentParser(description="Time the SQL library.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--prompts", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / catalog.CATALOG_FILE
        with catalog.writing(path) as connection:
            n = fill(connection, options.rows, options.prompts)
        print(f"{n} measurements, {path.stat().st_size / 1e6:.0f} MB")
        header = ("view", "comparisons", "rows", "view ms", "aggregate ms", "ratio", "materialise ms", "ratio")
        print(("{:>18}" * len(header)).format(*header))
        with catalog.reading(path) as connection:
            start = time.perf_counter()
            install(connection, temporary=True)
            installed = time.perf_counter() - start
            for view, columns in (("first_divergence", FIRST), ("divergence", ALL)):
                for scope, where in (("one", "comparison = 'comparison-4'"), ("all", "true")):
                    found = best_times(connection, statements(view, columns.split(), where), options.repeat)
                    (seconds, rows), (scan, _), (fetch, _) = found.values()
                    worst = max(worst, seconds / scan, seconds / fetch)
                    numbers = (1e3 * seconds, 1e3 * scan, seconds / scan, 1e3 * fetch, seconds / fetch)
                    print(f"{view:>18}{scope:>18}{rows:>18}" + "".join(f"{value:>18.2f}" for value in numbers))
    print(f"installing the library: {1e3 * installed:.1f} ms")
    print(f"largest ratio {worst:.2f}, limit {LIMIT:g}: {'ok' if worst <= LIMIT else 'TOO SLOW'}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
