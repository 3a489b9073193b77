"""The main job on the shipped model: a clean port passes, a planted bug is named at its site."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from tensorsleuth.cli.app import main
from tensorsleuth.cli.compare import first_divergence
from tensorsleuth.examples.faults import FAULTS
from tensorsleuth.examples.walkthrough import capture_references, capture_target, compare_target
from tensorsleuth.store import Trace


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace with the reference and the baseline of the demo."""
    path = tmp_path_factory.mktemp("demo") / "trace"
    capture_references(Trace.create(path), new_tokens=4)
    return path


@pytest.fixture
def trace(references: Path, tmp_path: Path) -> Trace:
    return Trace.open(shutil.copytree(references, tmp_path / "trace"))


def test_a_clean_port_passes_with_every_site_near_one(trace: Trace) -> None:
    capture_target(trace)
    summary = compare_target(trace)
    assert (summary.verdict, summary.reasons, summary.n_unmatched) == ("pass", (), 0)
    measured = (
        "SELECT min(r_ratio) AS low, max(r_ratio) AS high FROM measurements WHERE prompt IS NULL AND state = 'measured'"
    )
    (band,) = trace.query(measured).to_pylist()
    assert 0.8 <= band["low"] <= band["high"] <= 1.2
    assert first_divergence(trace, summary.comparison) is None


@pytest.mark.parametrize("fault", ["attention-scale", "bf16-variance", "decode-position", "fp8-qkv", "gate-up-swapped"])
def test_a_planted_bug_is_named_at_its_site(trace: Trace, fault: str) -> None:
    capture_target(trace, fault=fault)
    summary = compare_target(trace)
    first = first_divergence(trace, summary.comparison)
    assert summary.verdict == "fail"
    assert first is not None
    assert fnmatchcase(first["target_site"].partition("[")[0], FAULTS[fault].site)
    assert first["phase"] == FAULTS[fault].phase
    before = trace.query(
        """SELECT max(r_ratio) AS r FROM measurements
           WHERE prompt IS NULL AND verdict = 'pass' AND phase = ? AND exec_order < ?""",
        [first["phase"], first["exec_order"]],
    ).to_pylist()
    assert before[0]["r"] is None or before[0]["r"] < 1.2


def test_the_references_write_words_and_store_plan_and_observer_effect(references: Path) -> None:
    trace = Trace.open(references)
    run = trace.manifest("fp32")
    assert run.provenance["observer_effect"] == {"checked": True, "identical": True, "max_abs_difference": 0.0}
    plan, captured = run.provenance["plan"], run.provenance["captured"]
    assert (plan["n_tensors"], plan["nbytes"]) == (captured["n_tensors"], captured["nbytes"])
    written = bytes(token for item in run.tokens for token in item.token_ids if token < 256).decode()
    assert " the " in written


def test_the_command_ends_with_a_culprit_pictures_and_exit_code_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", str(folder), "--fault", "rope-base"]) == 1
    printed = capsys.readouterr().out
    assert "first divergent site: model.rotary_emb[0] (prefill)" in printed
    assert "1. rope base" in printed
    assert "stand-in for a Neuron run" in printed
    assert {path.name for path in folder.iterdir()} == {"trace", "layers.png", "qq.png"}
    assert main(["demo", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_all_faults_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--list-faults", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(FAULTS)
