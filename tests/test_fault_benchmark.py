"""The fault benchmark in short: what is planted is planted where it says, and scored as it says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install 'tensorsleuth[capture]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from faults.__main__ import missed  # noqa: E402
from faults.architectures import ARCHITECTURES  # noqa: E402
from faults.bench import Bench, Report, Settings, Suspected  # noqa: E402
from faults.causes import ACCEPTED  # noqa: E402
from faults.clean_variants import VARIANTS  # noqa: E402
from faults.effect import Effect, Truth, truth  # noqa: E402
from faults.fault import label  # noqa: E402
from faults.running import FAULTS, Target, is_right, run, targets  # noqa: E402
from faults.scoring import CleanOutcome, Outcome, judge, published_primary, wilson  # noqa: E402
from tensorsleuth.capture import recorder  # noqa: E402

#: Far below the effect of any bug, far above what FP32 rounds.
NOTHING = 1e-3


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Mixtral, hardly trained, on three short prompts."""
    folder = tmp_path_factory.mktemp("faults")
    limit = recorder.SMALL_PARAMETER_BYTES
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench("llama", Settings(folder / "cache", folder / "traces", n_prompts=3, n_decode=2, steps=3))
    torch.set_num_threads(threads)
    recorder.SMALL_PARAMETER_BYTES = limit


def test_there_are_enough_faults_variants_and_architectures() -> None:
    planted = {(t.architecture, t.fault) for t in targets([]) if t.fault != "clean"}
    assert len(FAULTS) >= 45
    assert len(VARIANTS) >= 20
    assert len({fault for _, fault in planted}) == len(FAULTS), "every fault applies somewhere"
    assert {architecture for architecture, _ in planted} == set(ARCHITECTURES)


def test_target_names_are_unique_and_globs_pick_them() -> None:
    everything = [target.name for target in targets([])]
    assert len(set(everything)) == len(everything)
    assert {target.name for target in targets(["gpt_oss/sinks-*/*"])} == {
        "gpt_oss/sinks-missing/-",
        "gpt_oss/sinks-missing-windowed/-",
    }


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.name)
def test_every_cause_has_a_name_in_the_diagnosis(fault: object) -> None:
    for severity in fault.severities:  # type: ignore[attr-defined]
        assert ACCEPTED[fault.cause_of(severity)]  # type: ignore[attr-defined]


def test_a_correct_port_computes_what_the_library_computes(bench: Bench) -> None:
    for name in ("port-2", "fused-qkv", "fused-gate-up", "blockwise", "right-padding"):
        variant = next(v for v in VARIANTS if v.name == name)
        assert bench.noise_of(variant.model(bench, torch.float32)) < NOTHING, name


@pytest.mark.parametrize(
    ("name", "severity", "phase", "origin"),
    [
        ("attention-scale", 1.5, "prefill", "model.layers.0.self_attn.o_proj"),
        ("rope-base", 50.0, "prefill", "model.rotary_emb"),
        ("cache-unwritten", None, "decode", "model.layers.0.self_attn.o_proj"),
        ("padding-seen", None, "prefill", "model.layers.0.self_attn.o_proj"),
        ("residual-attention", None, "prefill", "model.layers.1.post_attention_layernorm"),
        ("nan", None, "prefill", "model.layers.1.self_attn.o_proj"),
    ],
)
def test_a_fault_changes_nothing_before_its_place(
    bench: Bench, name: str, severity: object, phase: str, origin: str
) -> None:
    found = bench.truth(FAULTS[name], severity)
    assert found.visible
    assert found.phase == phase
    assert origin in found.origins
    assert found.early < NOTHING


def test_a_weak_fault_is_below_the_noise(bench: Bench) -> None:
    sizes = [bench.truth(FAULTS["norm-epsilon"], factor).size for factor in (1e3, 1e1)]
    assert sizes[0] > 10 * sizes[1]


def test_a_planted_fault_and_a_correct_port_go_through_the_whole_pipeline(bench: Bench) -> None:
    found = run(Target("llama", "norm-offset", "-"), bench.settings, keep=False)
    assert isinstance(found, Outcome)
    assert found.errors == {}
    assert (found.verdict, found.visible, found.origin_rank) == ("fail", True, 1)
    assert not Path(found.folder).exists(), "its trace is gone"
    clean = run(Target("llama", "clean", "library"), bench.settings, keep=False)
    assert isinstance(clean, CleanOutcome)
    assert (clean.errors, clean.verdict, clean.n_suspects) == ({}, "pass", 0)


def effect(phase: str, module: str, order: int, size: float) -> Effect:
    return Effect(phase, module, "output", "", order, size)


def test_the_truth_is_the_first_own_place_above_the_noise() -> None:
    sizes = (("a", 0.0), ("layers.0.norm", 0.5), ("b", 0.4), ("layers.1.norm", 3.0), ("c", 9.0))
    sites = [effect("prefill", module, order, size) for order, (module, size) in enumerate(sizes)]
    fault = FAULTS["norm-epsilon"]
    found = truth(fault, sites)
    assert found.origins == ("layers.0.norm", "layers.1.norm")
    assert (found.size, found.phase, found.early) == (3.0, "prefill", 0.0)


def test_an_earlier_phase_may_be_named_where_the_bug_acts_below_the_noise() -> None:
    sites = [effect("prefill", "norm", 0, 0.9), effect("decode", "norm", 0, 1.2)]
    found = truth(FAULTS["norm-epsilon"], sites)
    assert (found.phase, found.phases) == ("decode", ("prefill", "decode"))


def test_below_the_noise_nothing_need_be_found() -> None:
    found = truth(FAULTS["norm-epsilon"], [effect("prefill", "norm", 0, 0.7)])
    assert (found.visible, found.origins) == (False, ())


def test_only_the_right_module_in_the_right_phase_is_the_origin() -> None:
    expected = Truth(True, 5.0, "decode", ("decode",), ("x",), 5.0, 0.0)
    suspects = tuple(Suspected(m, m, p, "origin", 9.0) for m, p in (("x", "prefill"), ("y", "decode"), ("x", "decode")))
    named = (Suspected("x", "x", "decode", "finding", 9.0, "causal_mask", 0.9),)
    outcome = judge(
        "llama", FAULTS["cache-late"], None, expected, Report("fail", "fail", suspects, named, (), {}, {}, "")
    )
    assert outcome.origin_rank == 3
    assert outcome.confident_wrong
    assert not is_right(outcome)


def test_published_rules_take_the_largest_step_and_not_the_earliest() -> None:
    rows = (("a", "prefill", 1.0), ("b", "prefill", 127.0), ("c", "prefill", 1303.0), ("d", "prefill", 2.0))
    rows += (("e", "prefill", 3.0), ("f", "prefill", 9999.0))
    report = Report("fail", "fail", (), (), tuple((*row, "fail") for row in rows), {}, {}, "")
    assert published_primary(report) == ("c", "prefill", 1303.0)


@pytest.mark.parametrize(("right", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634)])
def test_intervals_are_wilsons(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_a_figure_is_missed_on_the_wrong_side_of_its_limit() -> None:
    assert missed(">= 97 %", 0.969)
    assert not missed(">= 97 %", 0.97)
    assert missed("<= 3 %", 0.031)
    assert not missed("", 0.0)


def test_severities_are_written_as_they_are_asked_for() -> None:
    assert [label(value) for value in (None, 1.004, 1e4, "int8")] == ["-", "1.004", "10000", "int8"]
