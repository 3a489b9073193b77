"""Values find counterparts whose names say nothing, and contradict names; they never guess and never hide a bug."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from numpy_runs import Array, Tensor, add_run
from tensorsleuth.analyze.align import match_prompts
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.layout_search import find_features
from tensorsleuth.analyze.matching import map_runs
from tensorsleuth.analyze.pairs import SiteMapping
from tensorsleuth.store import Trace

TOKENS = {0: list(range(12)), 1: list(range(20, 32))}
P = 11


def signal(seed: int, width: int = 64) -> Array:
    return np.random.default_rng(seed).standard_normal((1, P, width)).astype(np.float32)


@dataclass
class Runs:
    """A reference, a baseline and a target; values are given for prompt 0, those of prompt 1 follow from them."""

    trace: Trace
    noise: float = 1e-3

    def add(self, run: str, sites: dict[str, Array], seed: int = 0, **options: object) -> None:
        tensors = []
        for order, (name, values) in enumerate(sites.items()):
            module, _, slot = name.removesuffix("]").partition("[")
            for prompt in (0, 1):
                array = np.roll(values, prompt, 1)
                if seed:
                    array = array + self.noise * np.random.default_rng(seed + order).standard_normal(array.shape)
                tensors.append(Tensor(module, array.astype(np.float32), prompt=prompt, order=order, slot=slot))
        add_run(self.trace, run, tensors, tokens=TOKENS, **options)  # type: ignore[arg-type]

    def map(self, reference: dict[str, Array], target: dict[str, Array]) -> SiteMapping:
        self.add("r", reference)
        self.add("b", reference, 100)
        self.add("t", target, 200)
        return map_runs(self.trace, ("r", "b", "t"), match_prompts(self.trace, "r", "b", "t")).mapping


@pytest.fixture
def runs(trace: Trace) -> Runs:
    return Runs(trace)


def found(mapping: SiteMapping) -> dict[str, list[tuple[str, str]]]:
    pairs: dict[str, list[tuple[str, str]]] = {}
    for pair in mapping.pairs:
        pairs.setdefault(pair.reference.name, []).append((pair.target.name, pair.transform))
    return pairs


SITES = {f"layers.{i}.{name}": signal(10 * i + n) for i in range(3) for n, name in enumerate(("attn", "ffn", "ln"))}


def test_sites_of_any_name_are_found(runs: Runs) -> None:
    mapping = runs.map(SITES, {f"blk{place}": values for place, values in enumerate(SITES.values())})
    assert found(mapping) == {name: [(f"blk{place}", "identity")] for place, name in enumerate(SITES)}
    assert mapping.gaps == mapping.ambiguous == ()
    assert all(0.5 <= pair.score <= 1 and "relative difference" in pair.reason for pair in mapping.pairs)


HEADS = signal(1).reshape(1, P, 4, 16)


@pytest.mark.parametrize(
    ("values", "transform"),
    [
        (HEADS[:, :, [2, 3, 0, 1]], "reorder"),
        (HEADS.swapaxes(2, 3), "reorder"),
        (HEADS.reshape(1, P, 4, 2, 8).swapaxes(3, 4), "reorder"),
        (np.concatenate([signal(2, 32), HEADS.reshape(1, P, 64), signal(3, 16)], 2), "slice"),
        (np.repeat(HEADS, 2, 2), "reorder"),
    ],
    ids=["heads", "transposed", "interleaved", "wider", "repeated"],
)
def test_a_rearrangement_is_found_and_undone(runs: Runs, values: Array, transform: str) -> None:
    mapping = runs.map({"q": signal(1)}, {"other": signal(8), "x": values.reshape(1, P, -1)})
    assert found(mapping) == {"q": [("x", transform)]}
    summary = compare(runs.trace, ComparisonRequest("r", "t", "b"))
    assert summary.verdict == "pass"
    spec = runs.trace.query("SELECT transform, transform_spec FROM mapping_entries").to_pylist()[0]
    assert (spec["transform"], spec["transform_spec"] is not None) == (transform, True)


def test_a_site_in_pieces_is_put_together(runs: Runs) -> None:
    whole = signal(1)
    pieces = {"c": whole[:, :, 40:], "a": whole[:, :, :24], "b": whole[:, :, 24:40], "z": signal(5, 24)}
    mapping = runs.map({"qkv": whole}, pieces)
    assert {p.target.name: p.reference_columns for p in mapping.pairs} == {
        "c": ((40, 64),), "a": ((0, 24),), "b": ((24, 40),),
    }  # fmt: skip
    assert compare(runs.trace, ComparisonRequest("r", "t", "b")).verdict == "pass"


def test_pieces_that_leave_a_hole_are_no_counterpart(runs: Runs) -> None:
    whole = signal(1)
    mapping = runs.map({"qkv": whole}, {"a": whole[:, :, :24], "b": whole[:, :, 24:40]})
    assert mapping.pairs == ()
    assert [gap.status for gap in mapping.gaps] == ["unmatched"]


def test_a_shuffle_that_no_program_makes_is_not_believed(runs: Runs) -> None:
    shuffled = signal(1)[:, :, np.random.default_rng(0).permutation(64)]
    assert runs.map({"q": signal(1)}, {"x": shuffled}).pairs == ()


def test_two_equally_good_sites_are_listed_not_guessed(runs: Runs) -> None:
    mapping = runs.map({"ffn": signal(1)}, {"x": signal(1), "y": signal(1)})  # each with noise of its own
    assert mapping.pairs == ()
    assert {site.name for site in mapping.ambiguous[0].candidates} == {"x", "y"}
    assert [(gap.status, "x" in gap.reason and "y" in gap.reason) for gap in mapping.gaps] == [("unmatched", True)]
    assert compare(runs.trace, ComparisonRequest("r", "t", "b")).verdict == "undecided"


def test_sites_that_hold_the_same_bits_are_one_counterpart(runs: Runs) -> None:
    runs.noise = 0.0
    mapping = runs.map({"ffn": signal(1)}, {"x": signal(1), "y": signal(1)})
    assert found(mapping) == {"ffn": [("x", "identity")]}
    assert "1 more target sites hold the same" in mapping.pairs[0].reason


def test_constants_say_nothing(runs: Runs) -> None:
    runs.noise = 0.0
    assert runs.map({"ffn": np.ones((1, P, 64))}, {"x": np.ones((1, P, 64))}).pairs == ()


def test_a_wrong_value_does_not_cost_a_site_its_name(runs: Runs) -> None:
    mapping = runs.map({"mlp": signal(1), "norm": signal(2)}, {"mlp": signal(7), "norm": 1.01 * signal(2)})
    assert found(mapping) == {"mlp": [("mlp", "identity")], "norm": [("norm", "identity")]}
    assert mapping.ambiguous == ()
    by_name = {pair.reference.name: pair for pair in mapping.pairs}
    assert by_name["mlp"].score < 0.1
    assert by_name["mlp"].reason == "same name; its values differ"
    assert compare(runs.trace, ComparisonRequest("r", "t", "b")).verdict == "fail"


def test_swapped_heads_are_no_rearrangement_when_the_name_is_right(runs: Runs) -> None:
    swapped = HEADS[:, :, [1, 0, 2, 3]].reshape(1, P, 64)
    mapping = runs.map({"layers.0.self_attn.k_proj": signal(1)}, {"layers.0.self_attn.k_proj": swapped})
    assert [pair.transform for pair in mapping.pairs] == ["identity"]
    assert compare(runs.trace, ComparisonRequest("r", "t", "b")).verdict == "fail"


def test_sites_that_changed_places_keep_their_names_and_are_listed(runs: Runs) -> None:
    reference = {"k_proj": signal(1), "v_proj": signal(2), "o_proj": signal(3)}
    mapping = runs.map(reference, {"k_proj": signal(2), "v_proj": signal(1), "o_proj": signal(3)})
    assert {name: pairs[0][0] for name, pairs in found(mapping).items()} == {name: name for name in reference}
    assert {note.site.name: [site.name for site in note.candidates] for note in mapping.ambiguous} == {
        "k_proj": ["k_proj", "v_proj"],
        "v_proj": ["v_proj", "k_proj"],
    }
    summary = compare(runs.trace, ComparisonRequest("r", "t", "b"))
    assert summary.verdict == "fail"
    assert any(
        "k_proj is compared with k_proj by name, but its values are those of v_proj" in r for r in summary.reasons
    )


REPEATED = np.repeat(HEADS[:, :, :2], 2, 2)


def test_repeated_heads_of_the_right_name_are_taken_once(runs: Runs) -> None:
    own = HEADS[:, :, :2].reshape(1, P, 32)
    mapping = runs.map({"self_attn.k_proj": own}, {"self_attn.k_proj": REPEATED.reshape(1, P, 64)})
    assert [pair.columns for pair in mapping.pairs] == [((0, 16), (32, 48))]
    assert compare(runs.trace, ComparisonRequest("r", "t", "b")).verdict == "pass"


def test_repeated_heads_in_the_wrong_order_are_a_mismatch(runs: Runs) -> None:
    own = HEADS[:, :, :2].reshape(1, P, 32)
    runs.map({"self_attn.k_proj": own}, {"self_attn.k_proj": REPEATED[:, :, [2, 3, 0, 1]].reshape(1, P, 64)})
    assert compare(runs.trace, ComparisonRequest("r", "t", "b")).verdict == "fail"


def test_without_a_baseline_rounding_is_the_measure(trace: Trace) -> None:
    runs = Runs(trace, noise=2e-6)
    runs.add("r", SITES)
    runs.add("t", {f"blk{place}": values for place, values in enumerate(SITES.values())}, 200)
    mapping = map_runs(trace, ("r", None, "t"), match_prompts(trace, "r", None, "t")).mapping
    assert [pair.target.name for pair in mapping.pairs] == [f"blk{place}" for place in range(len(SITES))]


def test_large_sites_of_equal_distribution_are_told_apart(trace: Trace) -> None:
    """Sorted, 4096 normal values hardly differ from 4096 others; the values themselves decide."""
    wide = {name: signal(seed, 4096) for seed, name in enumerate(("a", "b", "c"))}
    add_run(trace, "r", [Tensor(n, v, order=o) for o, (n, v) in enumerate(wide.items())], tokens={0: range(12)})
    bf16 = [Tensor(n.upper() + "x", v.astype(ml_dtypes.bfloat16), order=o) for o, (n, v) in enumerate(wide.items())]
    add_run(trace, "t", bf16, tokens={0: range(12)}, dtype="bfloat16")
    mapping = map_runs(trace, ("r", None, "t"), match_prompts(trace, "r", None, "t")).mapping
    assert {name: pairs[0][0] for name, pairs in found(mapping).items()} == {"a": "Ax", "b": "Bx", "c": "Cx"}


def test_shards_are_found_as_the_tensor_they_make(trace: Trace) -> None:
    add_run(trace, "r", [Tensor("ffn", signal(1))], tokens={0: range(12)})
    halves = [Tensor("x", half, dims="b s h[tp]", rank=r) for r, half in enumerate(np.split(signal(1), 2, 2))]
    add_run(trace, "t", [*halves, *(Tensor("y", signal(2), rank=r, order=1) for r in (0, 1))],
            tokens={0: range(12)}, tp=2)  # fmt: skip
    mapping = map_runs(trace, ("r", None, "t"), match_prompts(trace, "r", None, "t")).mapping
    assert found(mapping) == {"ffn": [("x", "identity")]}


def test_few_positions_do_not_recognise_columns() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 64))
    assert find_features(rows[:, 8:16], rows, 1e-6) is None
    more = np.random.default_rng(0).standard_normal((4, 64))
    match = find_features(more[:, 8:16], more, 1e-6)
    assert match is not None
    assert (match.columns, match.residual) == (((8, 16),), 0.0)
