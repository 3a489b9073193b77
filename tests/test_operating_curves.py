"""What the page about operating curves says of each number, simulated anew with fewer trials."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from operating_curves import RULES, SCENARIOS, alarms, bhattacharyya  # noqa: E402

PAGE = ROOT / "docs" / "operating-curves.md"
BY_NAME = {scenario.name.split(",")[0]: scenario for scenario in SCENARIOS}
TRIALS = 30


def found(name: str, size: float, shape: tuple[int, int] = (64, 256)) -> dict[str, float]:
    return alarms(BY_NAME[name], size, shape, TRIALS, seed=1)


def test_faithful_ports_raise_no_alarm_but_in_the_published_gate() -> None:
    for shape in ((16, 64), (64, 256)):
        quiet = found("error inflated by a factor", 1.0, shape)
        assert all(share <= 0.1 for name, share in quiet.items() if name != "BC gate"), quiet
    assert found("error inflated by a factor", 1.0, (16, 64))["BC gate"] > 0.3


def test_r_and_the_qq_numbers_see_an_inflation() -> None:
    seen = found("error inflated by a factor", 1.5)
    assert all(share == 1.0 for name, share in seen.items() if not name.startswith("BC")), seen


def test_behind_a_shared_outlier_only_the_numbers_of_the_middle_see_an_inflation() -> None:
    seen = found("inflation beside a shared outlier of 1000", 1.5)
    assert {name for name, share in seen.items() if share > 0.9} == {name for name in RULES if name[0] in "QWK"}
    assert seen["R > 1.2"] == 0.0
    assert seen["BC gate"] < 0.1


def test_r_misses_a_small_bias_and_ks_sees_it() -> None:
    seen = found("bias", 0.3)
    assert seen["R > 1.2"] == 0.0
    assert seen["KS > 0.08"] > 0.9


def test_the_line_ignores_an_outlier_and_r_does_not() -> None:
    seen = found("one outlier of the target", 1000.0)
    assert seen["R > 1.2"] == 1.0
    assert seen["QQ slope beyond 1.2"] == 0.0


def test_equal_samples_overlap_fully_and_distant_ones_not_at_all() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    assert bhattacharyya(values, values) == pytest.approx(1.0)
    assert bhattacharyya(values, values + 100.0) == 0.0


def test_the_page_shows_every_rule_and_scenario() -> None:
    text = PAGE.read_text()
    assert (PAGE.parent / re.search(r"\((images/[\w-]+\.png)\)", text)[1]).exists()  # type: ignore[index]
    for scenario in SCENARIOS:
        assert f"### {scenario.name.capitalize()}: 64 tokens" in text
    for rule in RULES:
        assert f"| {rule} |" in text
