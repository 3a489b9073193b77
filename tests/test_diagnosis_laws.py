"""The laws that a diagnosis recomputes, held against torch and transformers, and the rule that names a cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from tensorsleuth.analyze.diagnosis.activations import ACTIVATIONS
from tensorsleuth.analyze.diagnosis.attention_law import Attention, Sequence, Shape, attend
from tensorsleuth.analyze.diagnosis.causes import CAUSES, causes, entry_of
from tensorsleuth.analyze.diagnosis.config import ModelConfig
from tensorsleuth.analyze.diagnosis.hypothesis import DESCRIPTION, INHERITED, LAW, NUMBER, Prediction, Scored
from tensorsleuth.analyze.diagnosis.norms import Norm
from tensorsleuth.analyze.diagnosis.ranking import ENOUGH, UNKNOWN, decide
from tensorsleuth.analyze.diagnosis.rotary import Rotary
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: f"{scaling['rope_type']}-{scaling.get('factor', 1)}")
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_rotary_is_that_of_transformers(scaling: dict[str, Any], base: float) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, rope_theta=base, rope_scaling=dict(scaling),
        max_position_embeddings=1024,
    )  # fmt: skip
    read = ModelConfig(config.to_dict())
    assert read.rope["rope_type"] == scaling["rope_type"]
    positions = torch.arange(300)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    law = Rotary(16, float(read.rope["rope_theta"]), read.rope, read.attention_factor or 1.0, "half")
    assert_allclose(law(np.arange(300.0), sine=False), cos[0].numpy(), atol=2e-4)
    assert_allclose(law(np.arange(300.0), sine=True), sin[0].numpy(), atol=2e-4)


@settings(max_examples=25)
@given(st.integers(1, 9), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.floats(0.05, 2.0), st.integers(0, 2**31))
def test_attention_is_that_of_torch(n: int, heads: tuple[int, int], scale: float, seed: int) -> None:
    q_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, q_heads, n, 4, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(1, kv_heads, n, 4, generator=generator, dtype=torch.float64) for _ in "kv")
    times = q_heads // kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), is_causal=True, scale=scale
    )
    flat = [x[0].transpose(0, 1).reshape(n, -1).numpy() for x in (query, key, value, expected)]
    sequence = Sequence(flat[0], np.arange(n), flat[1], flat[2], None, None, n)
    assert_allclose(attend(Attention(Shape(q_heads, kv_heads, 4), scale), sequence), flat[3], rtol=1e-9, atol=1e-12)


@settings(max_examples=20)
@given(st.integers(2, 40), st.floats(1e-8, 1e-2), st.integers(0, 2**31))
def test_norms_are_those_of_torch(width: int, epsilon: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, width), (width,), (width,)))
    functional = torch.nn.functional
    plain, centred = (Norm(w.numpy(), b.numpy() if c else None, epsilon, 0.0, c) for c in (False, True))
    assert_allclose(plain(x.numpy()), functional.rms_norm(x, (width,), w, epsilon).numpy(), rtol=1e-9)
    assert_allclose(centred(x.numpy()), functional.layer_norm(x, (width,), w, b, epsilon).numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("quick_gelu", "quick_gelu"),
     ("relu", "relu"), ("relu2", "relu2"), ("sigmoid", "sigmoid"), ("tanh", "tanh")],
)  # fmt: skip
def test_activations_are_those_of_transformers(name: str, theirs: str) -> None:
    x = torch.linspace(-9, 9, 301, dtype=torch.float64)
    assert_allclose(ACTIVATIONS[name](x.numpy()), ACT2FN[theirs](x).numpy(), rtol=1e-9, atol=1e-12)


def test_factors_are_named_after_the_config() -> None:
    config = ModelConfig({"hidden_size": 4096, "num_attention_heads": 32, "embedding_multiplier": 12.0})
    assert config.name_factor(64.0, 1e-3) == ["sqrt(hidden_size)"]
    assert config.name_factor(1 / 12.0, 1e-3) == ["1 / embedding_multiplier"]
    assert config.name_factor(128**-0.5, 1e-3) == ["1 / sqrt(head_dim)"]
    assert config.name_factor(7.7, 1e-3) == []
    assert ModelConfig({"text_config": {"hidden_size": 8}, "hidden_size": 99}).hidden_size == 8


def scored(cause: str, residual: float, *, level: int = LAW, noise: float = 1.0, error: float = 100.0) -> Scored:
    """A prediction that leaves `residual` of an error, all as norms."""
    share = min((error**2 - residual**2) / (error**2 - noise**2), 1.0)
    prediction = Prediction(cause, np.zeros((1, 1)), "s", "r", level)
    return Scored(prediction, residual**2, 1 - (residual / error) ** 2, share, residual / noise)


def test_a_cause_is_named_when_it_leaves_nothing_and_has_no_rival() -> None:
    found = decide(100.0, [scored("norm_epsilon", 1.0), scored("norm_offset", 50.0)])
    assert (found.cause, found.reason) == ("norm_epsilon", "")
    assert found.confidence == pytest.approx(0.98)
    assert found.runner_up is not None
    assert found.runner_up.prediction.cause == "norm_offset"


def test_two_that_explain_it_equally_well_leave_it_unknown() -> None:
    found = decide(100.0, [scored("norm_epsilon", 1.0), scored("norm_offset", 1.2)])
    assert (found.cause, found.confidence) == (UNKNOWN, 0.0)
    assert "equally well" in found.reason


def test_the_more_specific_of_two_equal_ones_is_believed() -> None:
    rivals = [scored("feature_gain", 0.9, level=DESCRIPTION), scored("multiplier", 1.1, level=NUMBER)]
    assert decide(100.0, rivals).cause == "multiplier"
    assert decide(100.0, [*rivals, scored("rope_multiplier", 1.2)]).cause == "rope_multiplier"


def test_an_error_that_came_in_is_not_blamed_on_the_site() -> None:
    assert decide(100.0, [scored("norm_epsilon", 1.0), scored(INHERITED, 1.1)]).cause == INHERITED


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(causes()[:8]), st.floats(0.5, 200.0)), max_size=6), st.floats(1.3, 1e4))
def test_no_cause_is_named_that_leaves_too_much(guesses: list[tuple[str, float]], error: float) -> None:
    found = decide(error, [scored(cause, residual, error=error) for cause, residual in guesses])
    assert 0.0 <= found.confidence <= 1.0
    if found.cause != UNKNOWN:
        assert found.best is not None
        assert found.best.share >= ENOUGH
        assert found.best.residual_ratio <= 2.0


def test_nothing_to_test_is_unknown() -> None:
    assert decide(1.0, []).cause == UNKNOWN


def test_a_prediction_needs_a_known_cause() -> None:
    with pytest.raises(ValueError, match="not one of the causes"):
        Prediction("gremlins", np.zeros((1, 1)), "", "")
    assert entry_of("norm_epsilon") == "norm-epsilon"
    assert entry_of(UNKNOWN) == ""
    assert UNKNOWN not in CAUSES
