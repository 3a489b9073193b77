"""A stored trace is enough: the models that were captured are gone, and every answer stays the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tensorsleuth.cli.app import main
from tensorsleuth.examples.walkthrough import MODEL

PROMPTS = (
    "The sea was calm",
    "Nothing is so firmly believed as",
    "A letter came in the morning",
    "When the war was over",
)


def answers(capsys: pytest.CaptureFixture[str], trace: Path) -> dict[str, tuple[int, object]]:
    """Exit code and output of every question, by command."""
    commands = {
        "compare": ["--reference", "fp32", "--baseline", "bf16", "--target", "port"],
        "logits": ["port"],
        "localize": ["port"],
        "diagnose": ["port"],
    }
    found = {}
    for command, arguments in commands.items():
        code = main([command, str(trace), *arguments, "--json"])
        found[command] = code, json.loads(capsys.readouterr().out)
    return found


def test_answers_need_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, port, trace = tmp_path / "model", tmp_path / "port", tmp_path / "trace"
    shutil.copytree(MODEL, model)
    shutil.copytree(MODEL, port)
    config = json.loads((port / "config.json").read_text())
    (port / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 100 * config["rms_norm_eps"]}))
    prompts = [part for text in PROMPTS for part in ("--prompt", text)]
    runs = (
        [str(model), "--run", "fp32", "--role", "reference", *prompts, "--generate", "3"],
        [str(model), "--run", "bf16", "--role", "baseline", "--dtype", "bf16", "--teacher", "fp32"],
        [str(port), "--run", "port", "--role", "target", "--dtype", "bf16", "--teacher", "fp32"],
    )
    for arguments in runs:
        assert main(["capture", "hf", str(trace), *arguments]) == 0
    capsys.readouterr()
    before = answers(capsys, trace)
    shutil.rmtree(model)
    shutil.rmtree(port)
    assert answers(capsys, trace) == before
    assert before["compare"][0] == before["diagnose"][0] == 1
    (first, *_) = before["diagnose"][1]["findings"]  # type: ignore[call-overload, index]
    assert (first["cause"], first["site"]) == ("norm_epsilon", "model.layers.0.input_layernorm")
