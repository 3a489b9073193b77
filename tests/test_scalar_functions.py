"""SQL functions of tensors against numpy and `measure`, on a real trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tensorsleuth.analyze import order_statistics, scalar_functions
from tensorsleuth.analyze.measure import Triple, measure
from tensorsleuth.analyze.scalar_functions import FUNCTIONS
from tensorsleuth.analyze.sql_library import run_sql
from tensorsleuth.store import (
    InputError,
    IntegrityError,
    RunManifest,
    RunWriter,
    TensorKey,
    Trace,
    TraceNotFoundError,
    catalog,
)


class Values:
    """Numpy arrays as the writer takes them."""

    def __init__(self, array: Any) -> None:
        self.array, self.memo, self.nbytes = np.ascontiguousarray(array), None, array.nbytes

    @contextmanager
    def values(self) -> Iterator[Any]:
        yield self.array


class Recorded:
    """A real trace of one run, whose tensors are known by name."""

    def __init__(self, folder: Path) -> None:
        self.trace = Trace.create(folder)
        self.manifest = self.trace.begin_run(
            RunManifest(
                0,
                "run",
                "reference",
                "import",
                "m",
                "float32",
                "cpu",
                1,
                "running",
                datetime.now(timezone.utc).isoformat(),
            )
        )
        self.folder = self.trace.run_folder("run")

    def write(
        self, tensors: dict[str, tuple[Any, str, int | None]], *, statistics_only: bool = False, rank: int = 0
    ) -> None:
        with RunWriter(
            self.folder, "run", rank=rank, statistics_only=statistics_only, manifest=self.manifest.to_json
        ) as writer:
            for order, (name, (array, dims, start)) in enumerate(tensors.items()):
                key = TensorKey(0, "prefill", 0, 0, order, name, "output", "", dims, start, None)
                writer.put(key, Values(array))

    def finish(self) -> None:
        self.trace.finish_run(self.manifest)
        self.ids = {row["module"]: row["tensor_id"] for row in self.trace.query("FROM tensors").to_pylist()}

    def value(self, call: str) -> Any:
        """A call such as `cosine(a, b)`, with names in place of ids."""
        named = re.sub(r"\b[a-z_0-9]+\b(?!\()", lambda match: str(self.ids.get(match[0], match[0])), call)
        return run_sql(self.trace, f"SELECT {named} AS value").to_pylist()[0]["value"]


GENERATOR = np.random.default_rng(7)
R = GENERATOR.standard_normal((1, 6, 8)).astype(np.float32)
B = R.astype(ml_dtypes.bfloat16)
T = (R * 1.01 + 1e-3).astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    recorded = Recorded(tmp_path_factory.mktemp("recorded") / "trace")
    broken = R.copy()
    broken[0, 2, 3] = np.nan
    recorded.write(
        {
            "r": (R, "b s h", 0),
            "b": (B, "b s h", 0),
            "t": (T, "b s h", 0),
            "t_tail": (T[:, 4:], "b s h", 4),
            "t_flat": (T[0], "(b s) h", 0),
            "t_swapped": (T.transpose(0, 2, 1), "b h s", 0),
            "later": (T, "b s h", 6),
            "narrow": (T[:, :, :4], "b s h", 0),
            "broken": (broken, "b s h", 0),
            "zeros": (np.zeros_like(R), "b s h", 0),
            "scale": (np.float64([3.0, -4.0]), "h", None),
            "gain": (np.int64([3, -6]), "h", None),
            "wave": (R + 1j * R, "b s h", 0),
            "nothing": (R[:, :0], "b s h", 0),
            "eighths": (R.astype(ml_dtypes.float8_e4m3fn), "b s h", 0),
        }
    )
    recorded.write({"unstored": (R * 3, "b s h", 0)}, statistics_only=True, rank=1)
    recorded.finish()
    return recorded


def test_functions_agree_with_measure_and_with_numpy(recorded: Recorded) -> None:
    flat = [array.reshape(6, 8) for array in (R, B, T)]
    expected = measure({0: [Triple(*flat, np.arange(6))]}, quantiles=False)[None]
    r, b, t = (array.astype(np.float64).ravel() for array in flat)
    assert recorded.value("r_ratio(r, b, t)") == pytest.approx(expected.r_ratio, rel=1e-12)
    assert recorded.value("r_ratio(r, b, t)") == pytest.approx(np.linalg.norm(t - r) / np.linalg.norm(b - r))
    assert recorded.value("relative_l2(r, t)") == pytest.approx(np.linalg.norm(t - r) / np.linalg.norm(r))
    assert recorded.value("cosine(r, t)") == pytest.approx(t @ r / np.linalg.norm(t) / np.linalg.norm(r))
    assert recorded.value("max_abs_error(r, t)") == np.abs(t - r).max()
    assert recorded.value("element(t, 13)") == t[13]
    for q in (0.0, 0.1, 0.5, 0.999, 1.0):
        assert recorded.value(f"tensor_quantile(t, {q})") == pytest.approx(np.quantile(t, q), rel=1e-12)


def test_tensors_are_compared_on_the_positions_they_share(recorded: Recorded) -> None:
    tail, head = T[0, 4:].astype(np.float64), R[0, 4:].astype(np.float64)
    assert recorded.value("relative_l2(r, t_tail)") == pytest.approx(np.linalg.norm(tail - head) / np.linalg.norm(head))
    assert recorded.value("max_abs_error(t, t_tail)") == 0
    assert recorded.value("max_abs_error(t, t_flat)") == 0
    assert recorded.value("max_abs_error(t_flat, t_swapped)") == 0
    assert recorded.value("relative_l2(scale, gain)") == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    "call",
    [
        "cosine(r, later)", "cosine(r, narrow)", "cosine(r, wave)", "cosine(r, unstored)", "cosine(r, NULL)",
        "cosine(r, zeros)", "r_ratio(r, r, r)", "relative_l2(nothing, nothing)", "element(r, 48)", "element(r, -1)",
        "element(wave, 0)", "tensor_quantile(nothing, 0.5)", "tensor_quantile(wave, 0.5)",
    ],
)  # fmt: skip
def test_what_is_undefined_is_null(recorded: Recorded, call: str) -> None:
    assert recorded.value(call) is None


def test_what_is_not_finite_is_nan_and_a_zero_denominator_infinite(recorded: Recorded) -> None:
    assert np.isnan(recorded.value("r_ratio(r, b, broken)"))
    assert np.isnan(recorded.value("tensor_quantile(broken, 0.5)"))
    assert recorded.value("r_ratio(r, r, t)") == np.inf


def test_every_function_of_the_list_can_be_called(recorded: Recorded) -> None:
    for function in FUNCTIONS:
        arguments = ["eighths"] * len(function.tensors) + (["0"] if function.argument else [])
        recorded.value(f"{function.name}({', '.join(arguments)})")


def test_functions_run_over_whole_tables(recorded: Recorded) -> None:
    found = run_sql(
        recorded.trace,
        """SELECT count(relative_l2(a.tensor_id, b.tensor_id)) AS n, max(cosine(a.tensor_id, b.tensor_id)) AS c
           FROM tensors a, tensors b, range(20)""",
    ).to_pylist()[0]
    assert found["n"] % 20 == 0
    assert found["n"] > 1000
    assert np.isnan(found["c"])


def test_errors_of_functions_keep_their_kind(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(TraceNotFoundError, match="no tensor 7"):
        recorded.value("element(7, 0)")
    with pytest.raises(InputError, match="from 0 to 1"):
        recorded.value("tensor_quantile(r, 1.5)")
    lost = Recorded(tmp_path / "trace")
    lost.write({"r": (R, "b s h", 0)})
    lost.finish()
    next(lost.folder.glob("*.h5")).unlink()
    with pytest.raises(IntegrityError, match="cannot be mapped"):
        lost.value("element(r, 0)")


def test_the_catalog_can_be_written_after_a_query(recorded: Recorded) -> None:
    recorded.value("cosine(r, t)")
    with pytest.raises(InputError):
        run_sql(recorded.trace, "SELECT nothing")
    with catalog.writing(recorded.trace.catalog_path, timeout=0) as connection:
        connection.execute("SELECT 1")


def test_quantiles_of_large_tensors_are_exact_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_statistics, "_PIECE", 64)
    values = np.concatenate([GENERATOR.standard_normal(900), [0.0, -0.0, np.inf, -np.inf] * 5]).astype(np.float32)
    for q in (0.0, 0.3, 0.5, 0.77, 1.0):
        at = q * (len(values) - 1)
        below, above = np.sort(values.astype(np.float64))[[int(at), int(np.ceil(at))]]
        expected = below if below == above else below + (at - int(at)) * (above - below)
        assert order_statistics.quantile(values, q) == pytest.approx(expected, rel=1e-12)


def test_comparisons_in_pieces_are_the_same(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recorded.value("r_ratio(r, b, t_swapped)")
    monkeypatch.setattr(scalar_functions, "_PIECE", 16)
    monkeypatch.setattr(scalar_functions, "_RELEASE", 100)
    assert recorded.value("r_ratio(r, b, t_swapped)") == pytest.approx(whole, rel=1e-12)
