"""Causes around experts, padding and narrow weights, named from traces of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy_runs import Tensor, add_run
from tensorsleuth.analyze.diagnosis.attention_law import Attention, Sequence, Shape, attend
from tensorsleuth.analyze.diagnosis.padding import _mixed_in
from tensorsleuth.analyze.diagnosis.quantised import _normal_levels, as_released, through_narrow_formats
from tensorsleuth.store import Trace
from test_diagnosis import examined_run

Array = npt.NDArray[np.float64]
HIDDEN, WIDE, EXPERTS, TOP, PROMPTS, LENGTH = 16, 24, 5, 2, 3, 24
Route = Callable[[Array], Array]


def bf16(values: Array) -> Array:
    return np.asarray(values).astype(ml_dtypes.bfloat16).astype(np.float64)


def softmax(values: Array) -> Array:
    weights = np.exp(values - values.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def chosen(logits: Array, top: int) -> npt.NDArray[np.bool_]:
    return logits >= np.sort(logits, axis=1)[:, -top][:, None]


def top_of(top: int) -> Route:
    return lambda logits: softmax(np.where(chosen(logits, top), logits, -np.inf))


def uniform(logits: Array) -> Array:
    return chosen(logits, TOP) / TOP


def unnormalised(logits: Array) -> Array:
    return softmax(logits) * chosen(logits, TOP)


def sigmoid(logits: Array) -> Array:
    return chosen(logits, TOP) / (1 + np.exp(-logits))


class Block:
    """A block of experts, which records what its modules were given and returned."""

    def __init__(self, seed: int = 2) -> None:
        generator = np.random.default_rng(seed)
        self.router = bf16(generator.normal(size=(EXPERTS, HIDDEN)) * 0.4)
        self.gate, self.up = (bf16(generator.normal(size=(EXPERTS, WIDE, HIDDEN)) / 4) for _ in "gu")
        self.down = bf16(generator.normal(size=(EXPERTS, HIDDEN, WIDE)) / 5)
        self.given = generator.normal(size=(PROMPTS, LENGTH, HIDDEN))

    def run(
        self,
        keep: Callable[[Array], Array],
        route: Route | None = None,
        order: tuple[int, ...] = (),
        swap: bool = False,
    ) -> list[Tensor]:
        """Record all prompts in one batch, with experts in some order."""
        x = keep(self.given).reshape(-1, HIDDEN)
        logits = keep(x @ self.router.T)
        affinities = keep((route or top_of(TOP))(logits))
        total, parts = np.zeros_like(x), []
        for place in range(EXPERTS):
            n = (order or range(EXPERTS))[place]
            rows = np.flatnonzero(affinities[:, place])[::-1]
            gate, up = keep(x[rows] @ self.gate[n].T), keep(x[rows] @ self.up[n].T)
            gate, up = (up, gate) if swap else (gate, up)
            out = keep(keep(gate / (1 + np.exp(-gate)) * up) @ self.down[n].T)
            total[rows] += affinities[rows, place, None] * out
            at = f"mlp.experts.{place}"
            parts += [
                (at, "input", x[rows]),
                (f"{at}.w1", "output", gate),
                (f"{at}.w3", "output", up),
                (at, "output", out),
            ]
        dtype = np.float32 if keep is not bf16 else ml_dtypes.bfloat16
        tensors = [
            Tensor(module, values.astype(dtype), None, prompt=None, order=2 + number, port=port)
            for number, (module, port, values) in enumerate(parts)
        ]
        for module, port, order_, values in (
            ("mlp", "input", 0, x), ("mlp.gate", "output", 1, logits), ("mlp", "output", 90, keep(total)),
        ):  # fmt: skip
            by_prompt = values.reshape(PROMPTS, 1, LENGTH, -1).astype(dtype)
            tensors += [Tensor(module, by_prompt[p], 0, prompt=p, order=order_, port=port) for p in range(PROMPTS)]
        return tensors


TOKENS = {prompt: list(range(LENGTH)) for prompt in range(PROMPTS)}


MOE_CONFIG = {"num_experts_per_tok": TOP, "num_local_experts": EXPERTS, "hidden_size": HIDDEN, "model_type": "mixtral"}


def recorded(trace: Trace, run: str, role: str, tensors: list[Tensor]) -> None:
    dtype = "float32" if role == "reference" else "bfloat16"
    add_run(trace, run, tensors, role=role, tokens=TOKENS, provenance={"config": MOE_CONFIG}, dtype=dtype)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Block]:
    trace, block = Trace.create(tmp_path_factory.mktemp("experts") / "trace"), Block()
    recorded(trace, "fp32", "reference", block.run(lambda x: np.asarray(x, np.float32).astype(np.float64)))
    recorded(trace, "bf16", "baseline", block.run(bf16))
    return trace, block


@pytest.mark.parametrize(
    ("change", "cause", "parameter", "value"),
    [
        ({"route": top_of(1)}, "routing_top_k", "top_k", 1),
        ({"route": top_of(3)}, "routing_top_k", "top_k", 3),
        ({"route": uniform}, "routing_ignored", "top_k", TOP),
        ({"route": unnormalised}, "routing_unnormalised", "top_k", TOP),
        ({"route": sigmoid}, "routing_rule", "rule", "sigmoid"),
        ({"order": (1, 2, 3, 4, 0)}, "expert_order", "", None),
        ({"swap": True}, "gate_up_swapped", "", None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_wrong_with_experts_is_named(
    change: dict[str, Any],
    cause: str,
    parameter: str,
    value: Any,
    moe: tuple[Trace, Block],
    request: pytest.FixtureRequest,
) -> None:
    trace, block = moe
    run = request.node.callspec.id
    recorded(trace, run, "target", block.run(bf16, **change))
    found = examined_run(trace, run, "mlp")
    assert found.cause == cause, found
    assert found.confidence > 0.8
    if parameter:
        assert found.evidence["parameters"][parameter] == value
    if cause == "expert_order":
        told = found.evidence["parameters"]["order"]
        assert all(was in (-1, change["order"][place]) for place, was in enumerate(told))


def test_an_expert_that_is_another_one_is_named_at_its_own_site(moe: tuple[Trace, Block]) -> None:
    trace, block = moe
    recorded(trace, "next", "target", block.run(bf16, order=(1, 2, 3, 4, 0)))
    told = {place: examined_run(trace, "next", f"mlp.experts.{place}") for place in range(EXPERTS)}
    named = {place: found.evidence["parameters"]["is"] for place, found in told.items() if found.is_named}
    assert len(named) >= 2
    assert all(was == (place + 1) % EXPERTS for place, was in named.items())
    assert {found.cause for found in told.values()} == {"expert_order", "unknown"} or len(named) == EXPERTS


def test_an_experts_block_that_was_given_something_wrong_is_not_blamed(moe: tuple[Trace, Block]) -> None:
    trace, _ = moe
    other = Block()
    other.given = other.given * 1.05
    recorded(trace, "inherits", "target", other.run(bf16))
    assert examined_run(trace, "inherits", "mlp").cause == "inherited"


def test_experts_that_compute_something_unheard_of_get_no_name(moe: tuple[Trace, Block]) -> None:
    trace, _ = moe
    other = Block()
    other.down = other.down + 0.3 * np.roll(other.down, 1, axis=1)
    recorded(trace, "strange", "target", other.run(bf16))
    assert examined_run(trace, "strange", "mlp").cause == "unknown"


# Padding

HEADS, KV_HEADS, DIM, LENGTHS = 4, 2, 8, (20, 14, 17)


def attention(
    trace: Trace, run: str, role: str, padding: Array | None = None, batch: int | None = None, sign: float = 1.0
) -> None:
    """A run of one attention over prompts of three lengths; `padding` is the value of padding by KV head."""
    generator, tensors = np.random.default_rng(4), []
    shares = np.random.default_rng(5)
    keep = (lambda x: np.asarray(x, np.float32).astype(np.float64)) if role == "reference" else bf16
    for prompt, length in enumerate(LENGTHS):
        q, k, v = (keep(generator.normal(size=(length, n * DIM))) for n in (HEADS, KV_HEADS, KV_HEADS))
        law = Attention(Shape(HEADS, KV_HEADS, DIM), DIM**-0.5)
        heads = attend(law, Sequence(q, np.arange(length), k, v, None, None, length))
        if padding is not None and length < max(LENGTHS):
            share = shares.uniform(0.05, 0.8, size=(length, HEADS, 1))
            mixed = np.repeat(padding, HEADS // KV_HEADS, axis=0)
            heads = ((1 - sign * share) * heads.reshape(length, HEADS, DIM) + sign * share * mixed).reshape(length, -1)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        for order, (name, values) in enumerate(zip(names, (q, k, v, keep(heads)), strict=True)):
            array = values[None].astype(np.float32 if role == "reference" else ml_dtypes.bfloat16)
            port = "input" if name == "o_proj" else "output"
            tensors.append(Tensor(f"self_attn.{name}", array, 0, prompt=prompt, order=order, port=port))
    provenance: dict[str, Any] = {"config": {"head_dim": DIM, "num_attention_heads": HEADS}}
    if batch is not None:
        provenance["generation"] = {"padding": "left", "batch_size": batch}
    tokens = {prompt: list(range(length)) for prompt, length in enumerate(LENGTHS)}
    dtype = "float32" if role == "reference" else "bfloat16"
    add_run(trace, run, tensors, role=role, tokens=tokens, provenance=provenance, dtype=dtype)


@pytest.mark.parametrize(
    ("batch", "sign", "cause"),
    [(None, 1.0, "padding_mask"), (3, 1.0, "padding_mask"), (1, 1.0, "unknown"), (3, -1.0, "unknown")],
    ids=["batches unknown", "one batch", "nothing was padded", "moved away"],
)
def test_padding_that_is_seen_is_named_where_there_was_padding(
    batch: int | None, sign: float, cause: str, tmp_path: Path
) -> None:
    trace = Trace.create(tmp_path / "trace")
    attention(trace, "fp32", "reference")
    attention(trace, "bf16", "baseline")
    value = np.random.default_rng(6).normal(size=(KV_HEADS, DIM))
    attention(trace, "port", "target", value, batch, sign)
    found = examined_run(trace, "port", "self_attn.o_proj:input")
    assert found.cause == cause, found


@settings(max_examples=20)
@given(st.integers(2, 12), st.integers(8, 40), st.integers(0, 2**31))
def test_the_value_that_rows_move_towards_is_found(width: int, rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    r, v = generator.normal(size=(rows, width)), generator.normal(size=width)
    share = generator.uniform(0.1, 0.9, size=rows)
    told, value = _mixed_in(r, (1 - share)[:, None] * r + share[:, None] * v)
    assert_allclose(value, v, atol=1e-4)
    assert_allclose(told, share, atol=1e-4)


# Narrow weights


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    published = [
        -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ]  # fmt: skip
    assert_allclose(_normal_levels(), published, atol=1e-6)


def test_narrow_formats_leave_the_error_that_their_bits_allow() -> None:
    weight = bf16(np.random.default_rng(1).normal(size=(64, 256)))
    sizes: dict[str, list[float]] = {}
    for name, scheme, narrow in through_narrow_formats(weight, {}):
        assert narrow.shape == weight.shape
        assert scheme
        sizes.setdefault(name, []).append(float(np.linalg.norm(narrow - weight) / np.linalg.norm(weight)))
    bounds = {"INT8": (0.003, 0.012), "INT4": (0.05, 0.2), "FP8 E4M3": (0.02, 0.03), "FP8 E5M2": (0.04, 0.06),
              "MXFP4": (0.08, 0.2), "NF4": (0.05, 0.15)}  # fmt: skip
    for name, (low, high) in bounds.items():
        assert low <= min(sizes[name]) <= max(sizes[name]) <= high, (name, sizes[name])


def test_finer_scales_leave_less() -> None:
    weight = np.random.default_rng(1).normal(size=(64, 256)) * np.exp(np.random.default_rng(2).normal(size=(64, 1)))
    left = {
        scheme: float(np.linalg.norm(narrow - weight))
        for name, scheme, narrow in through_narrow_formats(weight, {})
        if name == "INT4"
    }
    ordered = [left[f"one scale per {n} inputs of an output channel"] for n in (32, 64, 128)]
    assert ordered == sorted(ordered)
    assert max(ordered) < left["one scale per output channel"] < left["one scale per tensor"]


def test_an_estimate_is_taken_for_bfloat16_only_when_it_is_that_near() -> None:
    generator = np.random.default_rng(3)
    weight = bf16(generator.normal(size=(32, 32)))
    assert np.array_equal(as_released(weight * (1 + 1e-5 * generator.normal(size=weight.shape))), weight)
    other = generator.normal(size=(32, 32))
    assert np.array_equal(as_released(other), other)


def projection(trace: Trace, run: str, role: str, change: Callable[[Array], Array] = lambda w: w) -> None:
    """A run of one projection over fewer tokens than it has inputs, so that no estimate of its weight is possible."""
    generator = np.random.default_rng(7)
    left, _, right = np.linalg.svd(generator.normal(size=(192, 128)), full_matrices=False)
    weight = bf16(left * np.arange(1, 129) ** -0.6 @ right)
    given = (generator.normal(size=(2, 24, 20)) @ generator.normal(size=(20, 128))) + generator.normal(
        size=(2, 24, 128)
    )
    keep = (lambda x: np.asarray(x, np.float32).astype(np.float64)) if role == "reference" else bf16
    given = keep(given)
    values = keep(given @ change(weight).T)
    dtype = np.float32 if role == "reference" else ml_dtypes.bfloat16
    tensors = [
        Tensor("q_proj", rows[prompt][None].astype(dtype), 0, prompt=prompt, order=order, port=port)
        for prompt in range(2)
        for order, (port, rows) in enumerate((("input", given), ("output", values)))
    ]
    tokens = {prompt: list(range(24)) for prompt in range(2)}
    add_run(trace, run, tensors, role=role, tokens=tokens, dtype="float32" if role == "reference" else "bfloat16")


def narrow(name: str, scheme: str) -> Callable[[Array], Array]:
    return lambda weight: next(
        values for told, scale, values in through_narrow_formats(weight, {}) if (told, scale) == (name, scheme)
    )


def noisy_rows(weight: Array) -> Array:
    changed = weight.copy()
    changed[:16] *= 1 + 0.5 * np.random.default_rng(8).normal(size=(16, weight.shape[1]))
    return changed


def low_rank(weight: Array) -> Array:
    generator = np.random.default_rng(9)
    return weight + 0.02 * generator.normal(size=(len(weight), 2)) @ generator.normal(size=(2, weight.shape[1]))


def of_part(part: int, parts: int) -> Callable[[Array], Array]:
    """One rank's part of the inputs, counted from 1."""

    def change(weight: Array) -> Array:
        size = weight.shape[1] // parts
        kept = np.zeros_like(weight)
        kept[:, (part - 1) * size : part * size] = weight[:, (part - 1) * size : part * size]
        return kept

    return change


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    trace = Trace.create(tmp_path_factory.mktemp("projection") / "trace")
    projection(trace, "fp32", "reference")
    projection(trace, "bf16", "baseline")
    return trace


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("fp8", narrow("FP8 E4M3", "one scale per tensor"), "quantised_weights"),
        ("int4", narrow("INT4", "one scale per output channel"), "quantised_weights"),
        ("mxfp4", narrow("MXFP4", "one scale per 32 inputs of an output channel"), "quantised_weights"),
        ("scaled", lambda w: w * 1.03, "multiplier"),
        ("gains", lambda w: w * (1 + 0.03 * np.sin(np.arange(len(w))))[:, None], "feature_gain"),
        ("some-rows", noisy_rows, "unknown"),
        ("low-rank", low_rank, "unknown"),
        ("foreign", lambda w: np.roll(w, 7, axis=1), "unknown"),
        ("eighth", of_part(3, 8), "missing_all_reduce"),
        ("sixteenth", of_part(16, 16), "missing_all_reduce"),
        ("half", of_part(2, 2), "unknown"),  # more inputs than tokens
        ("three-quarters", lambda w: w - of_part(1, 4)(w), "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rounded_weights_are_told_without_their_matrix(
    name: str, change: Callable[[Array], Array], cause: str, projected: Trace
) -> None:
    projection(projected, name, "target", change)
    found = examined_run(projected, name, "q_proj")
    assert found.cause == cause, found
    if cause == "quantised_weights":
        assert found.evidence["parameters"]["slope"] == pytest.approx(1.0, abs=0.1)
        assert found.entry == "quantised-weights"
    if cause == "missing_all_reduce":
        told = found.evidence["parameters"]
        assert (told["part"] + 1, told["parts"]) == {"eighth": (3, 8), "sixteenth": (16, 16)}[name]
