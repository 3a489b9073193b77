"""Localization: origins apart from what inherits their error, on measured numbers, numpy runs and a real model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_runs import Tensor, add_run
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.localization.candidates import candidates, injected_error
from tensorsleuth.analyze.localization.changes import site_changes
from tensorsleuth.analyze.localization.localize import localize
from tensorsleuth.analyze.localization.replays import Replayed
from tensorsleuth.analyze.localization.site_errors import SiteError
from tensorsleuth.analyze.localization.suspects import Suspect, rank, suspects
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import HuggingFaceCausalModel, ModelSource
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face, run_recorded
from tensorsleuth.capture.prompts import PromptInput, teacher_prompts
from tensorsleuth.capture.selection import Selection
from tensorsleuth.cli.app import main
from tensorsleuth.store import Trace
from transformers import AutoModelForCausalLM

BASELINE_ERROR = 2e-3


def site(
    order: int, name: str, r: float | None, *, phase: str = "prefill", baseline: float = BASELINE_ERROR, **changes: Any
) -> SiteError:
    """A compared site with a narrow interval; it fails above 1.2."""
    module, _, port = name.partition(":")
    known = r is not None
    error = r * baseline if r is not None else None
    return replace(
        SiteError(
            order, name, name, module, port or "output", "", 0, order, phase, 4096, r, 0.98 * r if r else None,
            1.02 * r if r else None, None, error, baseline if known else None, (float(order), baseline, error), r,
            "measured" if known else "exact", "fail" if known and error is not None and r and r > 1.2 else "pass",
        ),
        **changes,
    )  # fmt: skip


def ranked(*sites: SiteError, replays: dict[tuple[str, str], Replayed] | None = None) -> list[Suspect]:
    phases: dict[str, list[SiteError]] = {}
    for one in sites:
        phases.setdefault(one.phase, []).append(one)
    return rank(
        candidates(phases, replays or {}), phases, {phase: site_changes(some) for phase, some in phases.items()}
    )


def chain(*ratios: float, phase: str = "prefill") -> list[SiteError]:
    return [site(order, f"layers.{order}", r, phase=phase) for order, r in enumerate(ratios)]


def test_the_earliest_injection_is_first_and_not_the_largest_r() -> None:
    found = ranked(*chain(1.0, 1.02, 40.0, 90.0, 130.0, 25.0))
    assert [(one.rank, one.site, one.kind) for one in found[:2]] == [
        (1, "layers.2", "origin"),
        (2, "layers.3", "inherited"),
    ]


def test_a_clean_comparison_has_no_suspects() -> None:
    assert ranked(*chain(1.0, 1.05, 0.97, 1.1)) == []


def test_a_later_jump_that_the_first_cannot_explain_is_an_origin_of_its_own() -> None:
    found = ranked(*chain(1.0, 4.0, 4.0, 3.0, 400.0, 380.0))
    assert [one.site for one in found if one.kind == "origin"] == ["layers.1", "layers.4"]


def test_an_error_that_ends_at_a_good_module_does_not_explain_a_later_one() -> None:
    inside = [site(0, "layers.0.mlp.up", 30.0), site(1, "layers.0.mlp", 1.01), site(2, "layers.1.norm", 1.0)]
    found = ranked(*inside, site(3, "layers.2.mlp.up", 35.0), site(4, "layers.2", 20.0))
    assert {one.site for one in found if one.kind in ("origin", "spike")} == {"layers.0.mlp.up", "layers.2.mlp.up"}


def test_parallel_branches_are_reported_separately() -> None:
    attention = "layers.0.self_attn"
    found = ranked(
        site(0, "layers.0.input_layernorm", 1.0),
        site(1, f"{attention}.q_proj", 6.0),
        site(2, f"{attention}.k_proj", 1.0),
        site(3, f"{attention}.v_proj", 7.0),
        site(4, f"{attention}.o_proj", 5.0),
    )
    assert [one.site for one in found if one.kind == "origin"] == [f"{attention}.q_proj", f"{attention}.v_proj"]


def test_rotary_error_explains_the_attention_after_good_projections() -> None:
    attention = "layers.0.self_attn"
    found = ranked(
        site(0, "rotary_emb", 130.0),
        site(1, "layers.0.input_layernorm", 1.0),
        *(site(2 + i, f"{attention}.{letter}_proj", 1.0) for i, letter in enumerate("qkv")),
        site(5, f"{attention}.o_proj", 60.0),
        site(6, "layers.0", 30.0),
    )
    assert (found[0].site, found[0].kind) == ("rotary_emb", "origin")
    assert {one.kind for one in found[1:]} == {"inherited"}


def test_a_container_inherits_from_its_child() -> None:
    found = ranked(site(0, "mlp.up", 1.0), site(1, "mlp.down", 9.0), site(2, "mlp", 9.0), site(3, "norm", 8.0))
    assert (found[0].site, found[0].kind) == ("mlp.down", "origin")
    assert found[1].kind == "inherited"


def test_a_bad_site_whose_neighbours_are_good_is_a_spike_and_comes_last() -> None:
    found = ranked(*chain(1.0, 1.9, 1.0, 1.0, 1.0, 80.0, 70.0))
    assert [(one.site, one.kind) for one in found[:2]] == [("layers.5", "origin"), ("layers.1", "spike")]


def test_a_weak_origin_does_not_come_before_a_strong_one_that_it_cannot_explain() -> None:
    found = ranked(*chain(1.0, 1.25, 1.22, 1.21, 200.0, 180.0))
    assert [one.site for one in found[:2]] == ["layers.4", "layers.1"]


def test_a_fault_of_decode_alone_is_named_in_decode() -> None:
    found = ranked(*chain(1.0, 1.0, 1.0), *chain(1.0, 50.0, 40.0, phase="decode"))
    assert (found[0].site, found[0].phase) == ("layers.1", "decode")
    assert "not in prefill" in found[0].reason


def test_decode_inherits_through_the_cache_what_prefill_got_wrong() -> None:
    found = ranked(*chain(1.0, 50.0, 40.0), *chain(1.0, 55.0, 40.0, phase="decode"))
    assert (found[0].site, found[0].phase) == ("layers.1", "prefill")
    assert "also in decode" in found[0].reason
    assert [one.phase for one in found if one.kind == "origin"] == ["prefill"]


def test_decode_may_have_an_origin_before_that_of_prefill() -> None:
    found = ranked(*chain(1.0, 1.0, 40.0), *chain(60.0, 50.0, 40.0, phase="decode"))
    assert [(one.site, one.phase) for one in found if one.kind == "origin"] == [
        ("layers.2", "prefill"),
        ("layers.0", "decode"),
    ]


def test_good_inputs_make_a_bad_output_an_origin_whatever_failed_before() -> None:
    found = ranked(
        site(0, "layers.0.mlp", 30.0),
        site(1, "layers.0", 25.0),
        site(2, "layers.1.gate:input", 1.01),
        site(3, "layers.1.gate", 20.0),
    )
    assert [(one.site, one.injected) for one in found if one.kind == "origin"] == [
        ("layers.0.mlp", None),
        ("layers.1.gate", pytest.approx(20.0, rel=1e-3)),
    ]
    assert "its inputs are good" in found[1].reason


def test_injected_error_is_r_with_good_inputs_and_at_most_one_when_all_is_inherited() -> None:
    out = site(1, "m", 12.0)
    assert injected_error(out, []) is None
    assert injected_error(out, [site(0, "m:input", None)]) == 12.0
    assert injected_error(out, [site(0, "m:input", 0.9)]) == 12.0
    assert injected_error(out, [site(0, "m:input", 12.0)]) == pytest.approx(1.0)
    assert injected_error(out, [site(0, "m:input", 30.0)]) == 0.0


def test_a_replay_overrules_the_place() -> None:
    sites = chain(1.0, 30.0, 30.0, 30.0)
    replays = {("layers.1", "prefill"): Replayed(30.0, True), ("layers.3", "prefill"): Replayed(25.0, True)}
    found = ranked(*sites, replays=replays)
    assert [(one.site, one.injected) for one in found if one.kind == "origin"] == [
        ("layers.1", 30.0),
        ("layers.3", 25.0),
    ]


def test_nan_is_an_origin_though_small_errors_came_before() -> None:
    bad = {"state": "nonfinite", "verdict": "fail", "relative": None, "equivalent_r": None, "content": (None,) * 3}
    found = ranked(*chain(1.0, 1.6, 1.5), site(3, "layers.3", None, **bad), site(4, "layers.4", None, **bad))
    assert [one.site for one in found if one.kind == "origin"] == ["layers.1", "layers.3"]


def test_a_lookup_that_the_baseline_gets_exactly_right_counts_by_its_relative_error() -> None:
    lost = {"relative": 8.0, "state": "baseline_exact", "verdict": "fail", "equivalent_r": 8.0 / 2**-8}
    found = ranked(
        site(0, "embed", math.inf, baseline=0.0, **lost),
        *(replace(s, exec_order=s.exec_order + 1, measurement=s.measurement + 1) for s in chain(900.0, 800.0)),
    )
    assert (found[0].site, found[1].kind) == ("embed", "inherited")


# Numpy runs and the command line


def three_runs(trace: Trace, errors: list[float], *, holes: bool = False) -> None:
    """Six sites over 48 positions; the target's error at each is a multiple of the baseline's."""
    rng = np.random.default_rng(0)
    exact = [rng.normal(size=(1, 48, 16)).astype(np.float32) for _ in errors]
    noise = [rng.normal(size=(2, 1, 48, 16)).astype(np.float32) * 2e-3 for _ in errors]
    runs = {
        "fp32": list(exact),
        "bf16": [value + n[0] for value, n in zip(exact, noise, strict=True)],
        "port": [value + factor * n[1] for value, n, factor in zip(exact, noise, errors, strict=True)],
    }
    for run, role in (("fp32", "reference"), ("bf16", "baseline"), ("port", "target")):
        tensors = [Tensor(f"layers.{i}", array, order=i) for i, array in enumerate(runs[run])]
        kept = tensors[:-1] if holes and run == "port" else tensors
        add_run(trace, run, kept, role=role, tokens={0: range(48)}, n_prompt=48)
    compare(trace, ComparisonRequest("fp32", "port", "bf16", "c"))


def test_localize_keeps_suspects_and_change_points_in_the_catalog(trace: Trace) -> None:
    three_runs(trace, [1.0, 1.0, 1.0, 20.0, 22.0, 19.0])
    found = localize(trace, "c")
    assert (found.verdict, found.suspects[0].site, found.suspects[0].kind) == ("fail", "layers.3", "origin")
    kept = trace.query(
        "SELECT rank, site, kind, r_ratio FROM suspects WHERE comparison = 'c' ORDER BY rank"
    ).to_pylist()
    assert [row["site"] for row in kept] == [one.site for one in found.suspects]
    changes = trace.query("SELECT kind, site, site_low, site_high, log_r_change FROM change_points").to_pylist()
    assert [(row["kind"], row["site"], row["site_low"], row["site_high"]) for row in changes] == [
        ("step", "layers.3", "layers.3", "layers.3")
    ]
    assert changes[0]["log_r_change"] == pytest.approx(math.log(20.0), abs=0.2)
    localize(trace, "c")
    assert trace.query("SELECT count(*) AS n FROM suspects").to_pylist() == [{"n": len(found.suspects)}]
    compare(trace, ComparisonRequest("fp32", "port", "bf16", "c"))
    assert trace.query("SELECT count(*) AS n FROM change_points").to_pylist() == [{"n": 0}]


@pytest.mark.parametrize(
    ("errors", "holes", "code"),
    [([1.0, 1.0, 1.0], False, 0), ([1.0, 9.0, 9.0], False, 1), ([1.0, 1.0, 1.0], True, 3)],
    ids=["clean", "fault", "hole"],
)
def test_the_exit_code_of_localize(
    trace: Trace, errors: list[float], holes: bool, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    three_runs(trace, errors, holes=holes)
    assert main(["localize", str(trace.path), "c", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == {0: "pass", 1: "fail", 3: "undecided"}[code]
    assert bool(printed["suspects"]) == (code == 1)
    assert main(["localize", str(trace.path), "c"]) == code
    assert ("most likely origin: layers.1" in capsys.readouterr().out) == (code == 1)


def test_an_unknown_comparison_is_one_line(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    three_runs(trace, [1.0, 1.0])
    assert main(["localize", str(trace.path), "nope"]) == 2
    assert "no comparison 'nope'; its comparisons: c" in capsys.readouterr().err


# A real model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> tuple[Path, Path]:
    """A random llama's folder, and a trace with its reference and baseline, inputs included."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_config(
        __import__("transformers").AutoConfig.from_pretrained(model_folder("llama"))
    )
    config.save_pretrained(folder / "model")
    trace = Trace.create(folder / "trace")
    prompts = [PromptInput(str(n), token_ids=tuple(range(1 + n, 20 + n))) for n in range(4)]
    chosen = Selection(inputs=True)
    source = ModelSource(folder / "model", attention="eager")
    capture_hugging_face(
        trace,
        HuggingFaceCapture(source, "fp32", "reference", prompts=prompts, generation=Generation(4), selection=chosen),
    )
    capture_hugging_face(
        trace, HuggingFaceCapture(source, "bf16", "baseline", "bfloat16", teacher="fp32", selection=chosen)
    )
    return folder / "model", folder / "trace"


def planted(llama: tuple[Path, Path], name: str, plant: Callable[[Any], None], *, inputs: bool = True) -> list[Suspect]:
    """Suspects of a BF16 run of the model with a fault."""
    trace = Trace.open(llama[1])
    model = AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.bfloat16, attn_implementation="eager").eval()
    plant(model)
    run_recorded(
        trace, model, HuggingFaceCausalModel(model), teacher_prompts(trace.manifest("fp32")), Generation(), run=name,
        role="target", stack="torch", model_name="planted", selection=Selection(inputs=inputs),
        facts={"teacher": "fp32"},
    )  # fmt: skip
    compare(trace, ComparisonRequest("fp32", name, "bf16"))
    return suspects(trace, name)


def test_an_unchanged_model_has_no_suspects(llama: tuple[Path, Path]) -> None:
    assert planted(llama, "clean", lambda model: None) == []


@pytest.mark.parametrize("inputs", [True, False], ids=["inputs", "outputs only"])
def test_a_wrong_weight_is_found_where_it_is(llama: tuple[Path, Path], inputs: bool) -> None:
    def plant(model: Any) -> None:
        model.model.layers[1].self_attn.o_proj.weight.data.mul_(1.5)

    first = planted(llama, f"weight-{inputs}", plant, inputs=inputs)[0]
    assert (first.module, first.phase, first.kind) == ("model.layers.1.self_attn.o_proj", "prefill", "origin")
    assert (first.injected is not None and first.injected > 10) == inputs


def test_attention_that_goes_wrong_between_modules_shows_at_the_input_of_the_next(llama: tuple[Path, Path]) -> None:
    def plant(model: Any) -> None:
        model.model.layers[1].self_attn.scaling *= 4.0

    first = planted(llama, "scale", plant)[0]
    assert (
        first.site == "model.layers.1.self_attn.o_proj:input[0]"
        or first.site == "model.layers.1.self_attn.o_proj:input"
    )
    assert first.kind == "origin"
