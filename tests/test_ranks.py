"""The global tensor from the shards of a run's ranks, and doubts when ranks contradict each other."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_runs import Array, Tensor, add_run
from tensorsleuth.analyze import align
from tensorsleuth.analyze.compare import ComparisonRequest, ComparisonSummary, compare
from tensorsleuth.analyze.loading import load_sites
from tensorsleuth.analyze.ranks import layout_of
from tensorsleuth.analyze.sites import Site, sites_of
from tensorsleuth.store import InputError, Trace
from tensorsleuth.store.dims import parse_dims

TOKENS = {0: list(range(12))}
P, H = 11, 64


def signal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape or (1, P, H)).astype(np.float32)


R = signal(0)
B, T = (R + 1e-3 * signal(seed) for seed in (1, 2))


def shards(array: Array, axis: int, dims: str, tp: int, *, copies: int = 1, module: str = "mlp") -> list[Tensor]:
    parts = np.split(array, tp // copies, axis)
    return [Tensor(module, parts[rank // copies], dims=dims, rank=rank, count=P) for rank in range(tp)]


def judge(
    trace: Trace, target: Sequence[Tensor], tp: int, reference: Array = R, **options: object
) -> ComparisonSummary:
    """Compare a target of several ranks with single-rank runs of one site."""
    dims = str(options.pop("dims", "b s h"))
    noise = np.random.default_rng(9).standard_normal(reference.shape).astype(np.float32)
    add_run(trace, "r", [Tensor("mlp", reference, dims=dims, count=P)], tokens=TOKENS)
    add_run(trace, "b", [Tensor("mlp", reference + 1e-3 * noise, dims=dims, count=P)], tokens=TOKENS)
    add_run(trace, "t", target, tokens=TOKENS, tp=tp)
    return compare(trace, ComparisonRequest("r", "t", "b", **options))  # type: ignore[arg-type]


def target_errors(trace: Trace) -> dict[str, float]:
    rows = trace.query("SELECT phase, target_error FROM measurements WHERE prompt IS NULL").to_pylist()
    return {row["phase"]: row["target_error"] for row in rows}


@pytest.mark.parametrize(
    ("text", "axis", "by_features", "copies", "partial"),
    [
        ("b s h", None, False, 1, False),
        ("b s h[tp]", 2, True, 1, False),
        ("b n[tp/2] s d", 1, True, 2, False),
        ("b s[tp] h", 1, False, 1, False),
        ("(b s) e{tp:sum}", None, False, 1, True),
        ("", None, False, 1, False),
    ],
)
def test_dims_say_how_ranks_hold_a_tensor(
    text: str, axis: int | None, by_features: bool, copies: int, partial: bool
) -> None:
    layout = layout_of(text)
    assert (layout.axis, layout.by_features, layout.copies, layout.partial) == (axis, by_features, copies, partial)


@pytest.mark.parametrize("text", ["b s[tp] h[tp]", "b s h[ep]", "b s h[tp]{tp:sum}"])
def test_dims_that_cannot_be_undone_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="dims"):
        layout_of(text)


def test_copies_are_part_of_the_axis() -> None:
    assert [axis.copies for axis in parse_dims("b s n[tp/4] d").axes] == [1, 1, 4, 1]


@pytest.mark.parametrize(("tp", "copies"), [(2, 1), (4, 1), (4, 2)])
def test_shards_are_joined_in_rank_order(trace: Trace, tp: int, copies: int) -> None:
    dims = "b s h[tp]" if copies == 1 else f"b s h[tp/{copies}]"
    summary = judge(trace, shards(T, 2, dims, tp, copies=copies), tp)
    assert (summary.verdict, summary.n_matched) == ("pass", 1)
    assert target_errors(trace)["prefill"] == pytest.approx(np.linalg.norm((T - R).astype(np.float64)), rel=1e-6)


@pytest.mark.parametrize(
    ("dims", "shape", "axis"),
    [("b s n[tp] d", (1, P, 4, 16), 2), ("b n[tp] s d", (1, 4, P, 16), 1), ("b n s d[tp]", (1, 4, P, 16), 3)],
)
def test_heads_are_joined_wherever_their_axis_is(trace: Trace, dims: str, shape: tuple[int, ...], axis: int) -> None:
    reference = signal(3, *shape)
    summary = judge(trace, shards(reference, axis, dims, 2), 2, reference, dims=dims.replace("[tp]", ""))
    assert summary.verdict == "pass"
    assert target_errors(trace) == {"prefill": 0.0}


def test_partial_sums_are_added(trace: Trace) -> None:
    first = signal(4)
    parts = [Tensor("mlp", part, dims="b s h{tp:sum}", rank=rank) for rank, part in enumerate((first, R - first))]
    assert judge(trace, parts, 2).verdict == "pass"
    assert target_errors(trace)["prefill"] < 1e-5


@pytest.mark.parametrize(("dtype", "total"), [(ml_dtypes.bfloat16, np.float32), (np.float32, np.float64),
                                              (np.int32, np.int64)])  # fmt: skip
def test_sums_are_wide_enough_to_be_as_good_as_exact(trace: Trace, dtype: type, total: type) -> None:
    parts = [Tensor("mlp", (100 * R).astype(dtype), dims="b s h{tp:sum}", rank=rank) for rank in range(3)]
    add_run(trace, "t", parts, tokens=TOKENS, tp=3)
    site = Site("mlp")
    rows = load_sites(trace, [("t", site)])["t", site][0].rows(trace, range(2, 5))
    assert (rows.dtype, rows.shape) == (total, (3, H))
    assert np.array_equal(rows, 3 * (100 * R).astype(dtype)[0, 2:5].astype(total))


def test_ranks_that_hold_different_positions_are_read_at_their_own(trace: Trace) -> None:
    parts = [Tensor("mlp", T[:, :6], 0, dims="b s[tp] h"), Tensor("mlp", T[:, 6:], 6, dims="b s[tp] h", rank=1)]
    decode = [Tensor("mlp", T[:, :1], 11, "decode", 1, rank=rank) for rank in (0, 1)]
    assert judge(trace, [*parts, *decode], 2).verdict == "pass"


def test_ranks_that_start_alike_follow_one_another(trace: Trace) -> None:
    parts = [Tensor("mlp", T[:, :6], dims="b s[tp] h"), Tensor("mlp", T[:, 6:], dims="b s[tp] h", rank=1)]
    assert judge(trace, parts, 2).verdict == "pass"


def test_a_rank_without_real_positions_is_not_missed(trace: Trace) -> None:
    assert judge(trace, [Tensor("mlp", T, dims="b s[tp] h")], 2).verdict == "pass"


def test_one_rank_is_read_without_a_copy(trace: Trace) -> None:
    add_run(trace, "t", [Tensor("mlp", T, rank=rank) for rank in (0, 1)], tokens=TOKENS, tp=2)
    rows = load_sites(trace, [("t", Site("mlp"))])["t", Site("mlp")][0].rows(trace, range(1, 9))
    assert not rows.flags.owndata
    assert not rows.flags.writeable
    assert np.array_equal(rows, T[0, 1:9])


def test_sizes_are_those_of_the_global_tensor(trace: Trace) -> None:
    tensors = [*shards(T, 2, "b s h[tp]", 4), *shards(T[:, :, :16], 2, "b s h[tp/2]", 4, copies=2, module="kv")]
    add_run(trace, "t", tensors, tokens=TOKENS, tp=4)
    assert {info.site.module: (info.features, info.shards) for info in sites_of(trace, "t")} == {
        "mlp": (64, 4),
        "kv": (16, 2),
    }


@pytest.mark.parametrize("copies", [1, 2])
def test_a_projection_fused_on_every_rank_is_taken_apart(trace: Trace, copies: int) -> None:
    """Every rank fuses its share of Q with its KV heads, which it may share with its neighbour."""
    tp = 2 * copies
    parts = {"q": signal(1, 1, P, 16), "k": signal(2, 1, P, 8), "v": signal(3, 1, P, 8)}
    for run in ("r", "b"):
        sites = [Tensor(f"model.self_attn.{n}_proj", v, order=o) for o, (n, v) in enumerate(parts.items())]
        add_run(trace, run, sites, tokens=TOKENS)
    fused = []
    for rank in range(tp):
        share = [np.split(parts["q"], tp, 2)[rank], *(np.split(parts[n], 2, 2)[rank // copies] for n in "kv")]
        fused.append(Tensor("self_attn.qkv_proj.Wqkv", np.concatenate(share, 2), dims="b s h[tp]", rank=rank))
    add_run(trace, "t", fused, tokens=TOKENS, tp=tp)
    summary = compare(trace, ComparisonRequest("r", "t", "b"))
    assert (summary.verdict, summary.n_matched, summary.reasons) == ("pass", 3, ())
    assert target_errors(trace) == {"prefill": 0.0}


def test_a_shard_alone_is_a_hole_that_says_so(trace: Trace) -> None:
    summary = judge(trace, shards(T, 2, "b s h[tp]", 2)[:1], 2)
    assert (summary.verdict, summary.n_unmatched) == ("undecided", 1)
    reason = trace.query("SELECT reason FROM coverage").to_pylist()[0]["reason"]
    assert "rank 1 of 2 did not record its part" in reason


def test_a_step_that_one_rank_lacks_is_left_out(trace: Trace) -> None:
    parts = [
        Tensor("mlp", part.array[:, :7], 0, dims=part.dims, rank=part.rank) for part in shards(T, 2, "b s h[tp]", 2)
    ]
    decode = Tensor("mlp", T[:, 7:8, :32], 7, "decode", 1, dims="b s h[tp]")
    assert any("7 of 11" in reason for reason in judge(trace, [*parts, decode], 2).reasons)


def test_dims_that_do_not_fit_the_shape_are_one_clear_error(trace: Trace) -> None:
    with pytest.raises(InputError, match="run 't', site mlp: dims 'b n s"):
        judge(trace, shards(T, 2, "b n s h[tp]", 2), 2)


def test_replicated_tensors_that_differ_leave_it_undecided(trace: Trace) -> None:
    other = T.copy()
    other[0, 3, 5] += 1e-6
    summary = judge(trace, [Tensor("mlp", T), Tensor("mlp", other, rank=1)], 2)
    assert summary.verdict == "undecided"
    assert summary.reasons[0].startswith("rank 1 of run 't' holds other values than its copies at mlp")


def test_copies_of_a_part_that_differ_leave_it_undecided(trace: Trace) -> None:
    parts = shards(T, 2, "b s h[tp/2]", 4, copies=2)
    parts[3] = Tensor("mlp", parts[3].array + 1, dims=parts[3].dims, rank=3)
    assert "rank 3 of run 't' holds other values" in judge(trace, parts, 4).reasons[0]


def test_a_rank_with_another_ranks_shard_is_named(trace: Trace) -> None:
    own = shards(T, 2, "b s h[tp]", 2)
    summary = judge(trace, [own[0], Tensor("mlp", own[0].array, dims="b s h[tp]", rank=1)], 2)
    assert summary.verdict == "fail"
    assert "rank 1 holds rank 0's shard of mlp in run 't'" in summary.reasons


def test_constant_shards_raise_no_doubt(trace: Trace) -> None:
    flat = np.ones_like(R)
    assert judge(trace, shards(flat, 2, "b s h[tp]", 2), 2, flat).verdict == "pass"


def test_the_first_doubtful_site_in_dataflow_order_is_named(trace: Trace) -> None:
    for run, values in (("r", R), ("b", B)):
        add_run(trace, run, [Tensor("late", values, order=1), Tensor("early", values)], tokens=TOKENS)
    ranks = [Tensor(m, T + rank, order=o, rank=rank) for rank in (0, 1) for m, o in (("late", 1), ("early", 0))]
    add_run(trace, "t", [*ranks, *(Tensor("first.spmd_rank", T + rank, order=-1, rank=rank) for rank in (0, 1))],
            tokens=TOKENS, tp=2)  # fmt: skip
    reasons = compare(trace, ComparisonRequest("r", "t", "b")).reasons
    assert any("at early (and 1 more sites)" in reason for reason in reasons)


def test_pieces_are_put_together_piece_by_piece(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of a sharded site stay small against the site."""
    monkeypatch.setattr(align, "_PIECE_ELEMENTS", 1 << 16)
    wide = np.random.default_rng(0).standard_normal((1, 2048, 512)).astype(np.float32)  # 4 MB
    tokens = {0: list(range(2049))}
    for run in ("r", "b"):
        add_run(trace, run, [Tensor("mlp", wide)], tokens=tokens)
    halves = [Tensor("mlp", half, dims="b s h[tp]", rank=rank) for rank, half in enumerate(np.split(wide, 2, 2))]
    add_run(trace, "t", halves, tokens=tokens, tp=2)
    site = Site("mlp")
    stored = load_sites(trace, [(run, site) for run in ("r", "b", "t")])
    prompts = align.match_prompts(trace, "r", "b", "t")
    aligned = align.align(trace, [stored[run, site] for run in ("r", "b", "t")], prompts, align.Selection())
    tracemalloc.start()
    sizes = [triple.target.nbytes for triple in aligned["prefill"][0]]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == wide.nbytes
    assert peak < wide.nbytes / 4


@settings(max_examples=8)
@given(st.integers(1, 4), st.sampled_from([1, 2]), st.permutations(["n", "s", "d"]), st.data())
def test_reading_undoes_any_split(
    tmp_path_factory: pytest.TempPathFactory, parts: int, copies: int, axes: list[str], data: st.DataObject
) -> None:
    trace = Trace.create(tmp_path_factory.mktemp("t") / "trace")
    lengths = {"n": 12, "s": P, "d": 3 * parts}
    whole = signal(5, 1, *(lengths[name] for name in axes))
    split = data.draw(st.sampled_from([a for a in ("n", "d") if lengths[a] % parts == 0]))
    mark = "[tp]" if copies == 1 else f"[tp/{copies}]"
    dims = "b " + " ".join(name + (mark if name == split else "") for name in axes)
    add_run(trace, "t", shards(whole, 1 + axes.index(split), dims, parts * copies, copies=copies), tokens=TOKENS,
            tp=parts * copies)  # fmt: skip
    rows = load_sites(trace, [("t", Site("mlp"))])["t", Site("mlp")][0].rows(trace, range(P))
    assert np.array_equal(rows, np.moveaxis(whole[0], axes.index("s"), 0).reshape(P, -1))
