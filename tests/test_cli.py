"""The command line: what it prints, its exit codes, and one clear line for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy_runs import Tensor, add_run
from tensorsleuth.cli.app import main
from tensorsleuth.store import Trace

Out = pytest.CaptureFixture[str]
VALUES = np.random.default_rng(0).standard_normal((1, 6, 16)).astype(np.float32)


@pytest.fixture
def compared(trace: Trace) -> Trace:
    """A trace with a comparison `t` that fails at `layers.0.mlp`."""
    noise = np.random.default_rng(1).standard_normal((2, *VALUES.shape)).astype(np.float32)
    for run, error in (("r", 0 * noise[0]), ("b", 1e-3 * noise[0]), ("t", 9e-3 * noise[1])):
        tensors = [Tensor("embed_tokens", VALUES, order=0), Tensor("layers.0.mlp", VALUES + error, order=1)]
        add_run(trace, run, tensors, tokens={0: list(range(7))}, role="target")
    assert main(["compare", str(trace.path), "--reference", "r", "--baseline", "b", "--target", "t"]) == 1
    return trace


def fails(arguments: list[str], capsys: Out) -> str:
    """Run a command that must fail with exit code 2 and one line."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sleuth: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_compare_names_the_first_divergent_site(compared: Trace, capsys: Out) -> None:
    capsys.readouterr()
    main(["compare", str(compared.path), "--reference", "r", "--baseline", "b", "--target", "t"])
    printed = capsys.readouterr().out
    assert "first divergent site: layers.0.mlp (prefill)" in printed
    assert "verdict: fail" in printed


def test_compare_speaks_json(compared: Trace, capsys: Out) -> None:
    capsys.readouterr()
    arguments = ["compare", str(compared.path), "--reference", "r", "--baseline", "b", "--target", "t", "--json"]
    assert main(arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["first_divergence"]["site"]) == ("fail", "layers.0.mlp")


def test_a_comparison_with_a_hole_exits_undecided(trace: Trace, capsys: Out) -> None:
    for run in ("r", "b", "t"):
        extra = [Tensor("norm", VALUES + 1, order=1)] if run != "t" else []
        add_run(trace, run, [Tensor("mlp", VALUES), *extra], tokens={0: list(range(7))})
    assert main(["compare", str(trace.path), "--reference", "r", "--baseline", "b", "--target", "t"]) == 3
    assert "1 unmatched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs"], '"role": "target"'),
        (["tensors", "--module", "*mlp"], '"module": "layers.0.mlp"'),
        (["verify"], '"problems": []'),
        (["index"], "{}"),
        (["sql", "SELECT count(*) AS n FROM tensors"], '"n": 6'),
        (["sql", "--list"], '"name": "first_divergence"'),
        (["repair"], "[]"),
    ],
)
def test_commands_speak_json(compared: Trace, capsys: Out, arguments: list[str], expected: str) -> None:
    capsys.readouterr()
    command, *rest = arguments
    assert main([command, str(compared.path), *rest, "--json"]) == 0
    printed = capsys.readouterr().out
    json.loads(printed)
    assert expected in printed


def test_sql_writes_csv_and_parquet(compared: Trace, tmp_path: Path, capsys: Out) -> None:
    import pyarrow.parquet as pq

    capsys.readouterr()
    assert main(["sql", str(compared.path), "SELECT run, shape FROM tensors LIMIT 1", "--format", "csv"]) == 0
    file = tmp_path / "rows.parquet"
    statement = "SELECT site, r_ratio FROM divergence"
    assert main(["sql", str(compared.path), statement, "--format", "parquet", "-o", str(file)]) == 0
    assert pq.read_table(file).num_rows == 2


def test_show_prints_and_saves_values(compared: Trace, tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "values.npy"
    assert main(["show", str(compared.path), "1000000000000", "--save", str(file)]) == 0
    assert "embed_tokens" in capsys.readouterr().out
    assert np.array_equal(np.load(file), VALUES)


def test_bad_usage_is_one_line(capsys: Out) -> None:
    assert "--run" in fails(["capture", "hf", "somewhere", "model"], capsys)
    assert "No such command 'foo'" in fails(["foo"], capsys)


Case = Callable[[Trace, Path], tuple[list[str], str]]
CASES: dict[str, Case] = {
    "no trace": lambda t, p: (["runs", str(p / "nowhere")], "holds no trace"),
    "unknown run": lambda t, p: (
        ["compare", str(t.path), "--reference", "x", "--baseline", "b", "--target", "t"],
        "has no run 'x'; its runs: r, b, t",
    ),
    "same run twice": lambda t, p: (
        ["compare", str(t.path), "--reference", "r", "--baseline", "r", "--target", "t"],
        "must be different runs",
    ),
    "no model": lambda t, p: (
        ["capture", "hf", str(t.path), str(p / "model"), "--run", "n", "--role", "target", "--prompt", "a"],
        "does not exist; name a folder with a config.json",
    ),
    "unknown tensor": lambda t, p: (["show", str(t.path), "7"], "has no tensor 7"),
    "bad SQL": lambda t, p: (["sql", str(t.path), "SELEKT 1"], "SELEKT"),
    "writing SQL": lambda t, p: (["sql", str(t.path), "DROP TABLE tensors"], "sleuth"),
    "reading other files": lambda t, p: (["sql", str(t.path), "SELECT * FROM read_csv('/etc/hostname')"], "sleuth"),
    "unknown fault": lambda t, p: (["demo", str(p / "d"), "--fault", "gremlins"], "--list-faults"),
    "unknown table": lambda t, p: (["export", str(t.path), str(p / "out"), "--table", "nope"], "no table nope"),
    "merge of a taken name": lambda t, p: (["merge", str(t.path), str(t.path)], "merge with --prefix"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_one_line(compared: Trace, tmp_path: Path, capsys: Out, case: Case) -> None:
    arguments, expected = case(compared, tmp_path)
    assert expected in fails(arguments, capsys)


def capture_with(trace: Trace, model: Path, *options: str) -> list[str]:
    start = ["capture", "hf", str(trace.path), str(model), "--run", "n", "--role", "target", "--random-init", "0"]
    return [*start, *options]


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("", (), "is empty"),
        ('{"text": "a"', (), "prompts.jsonl:1 is not JSON"),
        ('{"token_ids": [1, "x"]}', (), "must be a list of integers"),
        ('{"token_ids": [999]}', (), "token id 999"),
        ('{"token_ids": [1, 2]}', ("--generate", "64"), "needs 65 positions"),
        ('{"text": "a"}', (), "no tokenizer"),
        ('{"token_ids": [1]}', ("--dtype", "float7"), "dtype 'float7' is unknown"),
        ('{"token_ids": [1]}', ("--layers", "3-1"), "layers '3-1' cannot be read"),
        ('{"token_ids": [1]}', ("--teacher", "nobody"), "has no run 'nobody'"),
    ],
)
def test_bad_capture_input_is_one_line_and_leaves_no_run(
    trace: Trace,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: Out,
    content: str,
    options: tuple[str, ...],
    expected: str,
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    arguments = capture_with(trace, model_folder("llama"), "--prompts", str(prompts), *options)
    assert expected in fails(arguments, capsys)
    assert trace.run_names() == []


def test_a_capture_and_its_plan(trace: Trace, model_folder: Callable[[str], Path], tmp_path: Path, capsys: Out) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [1, 2, 3]}\n{"token_ids": [4, 5], "id": "second"}')
    arguments = capture_with(trace, model_folder("llama"), "--prompts", str(prompts), "--generate", "3", "--json")
    assert main([*arguments, "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert trace.run_names() == []
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert (plan["n_tensors"], plan["nbytes"]) == (done["n_tensors"], done["nbytes"])
    assert done["observer"]["identical"]


def test_the_help_needs_neither_torch_nor_matplotlib() -> None:
    script = (
        "import sys; from tensorsleuth.cli.app import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout
