"""Causes named from a trace: one planted bug each, in a decoder of numpy arrays; the site, the cause and its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_decoder import (
    CONFIG,
    DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    PROMPT,
    VOCABULARY,
    Array,
    Port,
    angles,
    bf16,
    causal,
    norm,
    record,
    references,
    rotate,
)  # fmt: skip
from numpy_runs import Tensor, add_run
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.analyze.diagnosis import Finding, diagnose
from tensorsleuth.analyze.diagnosis.examination import examine
from tensorsleuth.analyze.diagnosis.origins import Origin
from tensorsleuth.analyze.diagnosis.runs import ComparedRuns
from tensorsleuth.analyze.sites import sites_of
from tensorsleuth.cli.app import main
from tensorsleuth.store import Trace, TraceNotFoundError, catalog

Change = Callable[[Port], dict[str, Any]]
NORM, O_PROJ = "model.layers.0.input_layernorm", "model.layers.0.self_attn.o_proj"
ROTARY, DOWN = "model.rotary_emb[0]", "model.layers.0.mlp.down_proj"


def norm_with(epsilon: float = 1e-5, offset: float = 0.0, *, centred: bool = False) -> Callable[..., Array]:
    def changed(x: Array, weight: Array, keep: Callable[[Array], Array]) -> Array:
        x = x - x.mean(-1, keepdims=True) if centred else x
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * (weight + offset)

    return changed


def low_precision_norm(x: Array, weight: Array, keep: Callable[[Array], Array]) -> Array:
    mean = bf16(bf16(x * x).mean(-1, keepdims=True))
    return keep(x * bf16(1 / np.sqrt(bf16(mean + 1e-5)))) * weight


def angles_of(base: float = 1e4, shift: float = 0.0, factor: float = 1.0) -> Callable[[Array], tuple[Array, Array]]:
    def changed(positions: Array) -> tuple[Array, Array]:
        frequencies = base ** (-np.arange(0, DIM, 2) / DIM) / factor
        turned = np.concatenate([(positions + shift)[:, None] * frequencies] * 2, axis=1)
        return np.cos(turned), np.sin(turned)

    return changed


def late_decode(positions: Array) -> tuple[Array, Array]:
    return angles(positions + (positions >= PROMPT))


def pairs(heads: Array, cos: Array, sin: Array) -> Array:
    other = np.stack([-heads[..., 1::2], heads[..., ::2]], -1).reshape(heads.shape)
    return heads * cos[:, None] + other * sin[:, None]


def pairs_with_angles(heads: Array, cos: Array, sin: Array) -> Array:
    half = DIM // 2
    return pairs(heads, np.repeat(cos[:, :half], 2, axis=1), np.repeat(sin[:, :half], 2, axis=1))


def part(heads: Array, cos: Array, sin: Array) -> Array:
    turned = rotate_first(heads[..., : DIM // 2], cos[:, : DIM // 4], sin[:, : DIM // 4])
    return np.concatenate([turned, heads[..., DIM // 2 :]], -1)


def rotate_first(heads: Array, cos: Array, sin: Array) -> Array:
    left, right = np.split(heads, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def late_values(key: Array, value: Array, prompt: int) -> tuple[Array, Array]:
    return key, np.concatenate([value[:prompt], value[prompt - 1 : -1]])


def overwritten(key: Array, value: Array, prompt: int) -> tuple[Array, Array]:
    slots = np.arange(len(key))
    slots[prompt - 1] = prompt if len(key) > prompt else prompt - 1
    return key[slots], value[slots]


def halved_stream(layer: int, stream: Array, block: Array) -> Array:
    return 0.5 * stream + block if layer == 2 else stream + block


def doubled_block(layer: int, stream: Array, block: Array) -> Array:
    return stream + 2 * block if layer == 2 else stream + block


def scaled_block(layer: int, stream: Array, block: Array) -> Array:
    return stream + 0.22 * block if layer % 2 else stream + block


def zero_decoded_keys(key: Array, value: Array, prompt: int) -> tuple[Array, Array]:
    return np.where(np.arange(len(key))[:, None, None] >= prompt, 0.0, key), value


def with_weight(name: str, change: Callable[[Array], Array]) -> Change:
    return lambda port: {"weights": {**port.weights, name: change(port.weights[name])}}


def swapped(one: str, other: str) -> Change:
    def change(port: Port) -> dict[str, Any]:
        w = port.weights
        return {"weights": {**w, one: w[other], other: w[one]}}

    return change


def partial_down(name: str, x: Array, weight: Array) -> Array:
    half = weight.shape[1] // 2
    return x[:, :half] @ weight[:, :half].T if name.endswith("down_proj") else x @ weight.T


def int4(weight: Array) -> Array:
    scale = np.abs(weight).max() / 7
    return np.rint(weight / scale) * scale


def tanh_gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def lost_residual(layer: int, stream: Array, block: Array) -> Array:
    return block if layer == 2 else stream + block


# name: change, site, phase, cause, a parameter of the evidence and its value
BUGS: dict[str, tuple[Change, str, str, str, str, Any]] = {
    "embedding": (lambda p: {"embed": lambda x: x * HIDDEN**0.5}, "model.embed_tokens", "prefill",
               "multiplier", "equals",
                  ["sqrt(hidden_size)"]),
    "epsilon": (lambda p: {"norm": norm_with(1e-3)}, NORM, "prefill", "norm_epsilon", "epsilon", 1e-3),
    "odd epsilon": (lambda p: {"norm": norm_with(2.5e-3)}, NORM, "prefill", "norm_epsilon", "epsilon",
                    pytest.approx(2.5e-3, rel=0.03)),
    "offset": (lambda p: {"norm": norm_with(offset=1.0)}, NORM, "prefill", "norm_offset", "", None),
    "centred": (lambda p: {"norm": norm_with(centred=True)}, NORM, "prefill", "norm_kind", "", None),
    "low variance": (lambda p: {"norm": low_precision_norm}, NORM, "prefill", "norm_low_precision", "rounded",
               "bfloat16"),
    "gain": (with_weight("model.norm", np.ones_like), "model.norm", "prefill", "norm_gain_missing", "", None),
    "other gain": (swapped(NORM, "model.layers.1.input_layernorm"), NORM, "prefill", "another_weight", "weight_of",
                   "model.layers.1.input_layernorm"),
    "rope base": (lambda p: {"angles": angles_of(5e5)}, ROTARY, "prefill", "rope_base", "base", 5e5),
    "odd base": (lambda p: {"angles": angles_of(23456.0)}, ROTARY, "prefill", "rope_base", "base",
                 pytest.approx(23456.0, rel=0.01)),
    "linear scaling": (lambda p: {"angles": angles_of(factor=4.0)}, ROTARY, "prefill", "rope_scaling_added",
               "factor", 4.0),
    "positions": (lambda p: {"angles": angles_of(shift=1.0)}, ROTARY, "prefill", "position_offset", "shift", 1.0),
    "late decode": (lambda p: {"angles": late_decode}, ROTARY, "decode", "position_offset", "shift", 1.0),
    "scale": (lambda p: {"scale": 1.0 / DIM}, O_PROJ, "prefill", "attention_scale", "scale", 1.0 / DIM),
    "odd scale": (lambda p: {"scale": 1.3 * DIM**-0.5}, O_PROJ, "prefill", "attention_scale", "scale",
                  pytest.approx(1.3 * DIM**-0.5, rel=0.02)),
    "pairs": (lambda p: {"rotate": pairs}, O_PROJ, "prefill", "rope_layout", "rotation", "pairs"),
    "pairs and angles": (lambda p: {"rotate": pairs_with_angles}, O_PROJ, "prefill", "rope_layout", "relaid", True),
    "half rotated": (lambda p: {"rotate": part}, O_PROJ, "prefill", "rope_partial", "rotated", DIM // 2),
    "no rope": (lambda p: {"rotate": lambda h, c, s: h}, O_PROJ, "prefill", "rope_missing", "", None),
    "backwards": (lambda p: {"rotate": lambda h, c, s: rotate(h, c, -s)}, O_PROJ, "prefill", "rope_direction",
               "", None),
    "sees next": (lambda p: {"visible": lambda q, k: causal(q + 1, k)}, O_PROJ, "prefill", "causal_mask", "ahead", 1),
    "own token": (lambda p: {"visible": lambda q, k: causal(q - 1, k)}, O_PROJ, "prefill", "causal_mask", "ahead", -1),
    "no mask": (lambda p: {"visible": lambda q, k: causal(q + 99, k)}, O_PROJ, "prefill", "causal_mask", "ahead", None),
    "window": (lambda p: {"visible": lambda q, k: causal(q, k) & (q[:, None] - k < 8)}, O_PROJ, "prefill",
               "sliding_window", "window", 8),
    "blind": (lambda p: {"visible": lambda q, k: causal(q, k) & ((k > 0) | (q[:, None] < PROMPT))}, O_PROJ, "decode",
              "mask_hides_keys", "hidden_keys", 1),
    "cache": (lambda p: {"cache": zero_decoded_keys}, O_PROJ, "decode", "stale_cache", "decoded", "zero_keys"),
    "late values": (lambda p: {"cache": late_values}, O_PROJ, "decode", "stale_cache", "decoded", "late_values"),
    "overwritten": (lambda p: {"cache": overwritten}, O_PROJ, "decode", "stale_cache", "decoded", "overwritten"),
    "tiled": (lambda p: {"share": lambda head: head % KV_HEADS}, O_PROJ, "prefill", "kv_head_order", "", None),
    "heads": (lambda p: {"mixed": lambda h: h.reshape(-1, HEADS, DIM).swapaxes(1, 2).reshape(h.shape)}, O_PROJ,
              "prefill", "input_order", "", None),
    "activation": (lambda p: {"act": tanh_gelu}, "model.layers.0.mlp.act_fn", "prefill", "wrong_activation",
                   "activation", "gelu_tanh"),
    "gate and up": (swapped("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
                    "model.layers.0.mlp.gate_proj", "prefill", "exchanged_projections", "", None),
    "transposed": (with_weight("model.layers.0.self_attn.q_proj", lambda w: w.T.copy()),
                   "model.layers.0.self_attn.q_proj", "prefill", "transposed_weight", "", None),
    "all-reduce": (lambda p: {"project": partial_down}, DOWN, "prefill", "missing_all_reduce", "parts", 2),
    "int4": (with_weight(DOWN, int4), DOWN, "prefill", "quantised_weights", "dtype", "INT4"),
    "residual": (lambda p: {"add": lost_residual}, "model.layers.1.post_attention_layernorm", "prefill",
                 "missing_residual", "lacks", "model.layers.0"),
    "block factor": (lambda p: {"add": scaled_block}, "model.layers.0", "prefill", "residual_multiplier", "factor",
                     pytest.approx(0.22, rel=0.02)),
    "half a stream": (lambda p: {"add": halved_stream}, "model.layers.1.post_attention_layernorm", "prefill",
                      "residual_multiplier", "factor", pytest.approx(0.5, rel=0.02)),
    "twice a block": (lambda p: {"add": doubled_block}, "model.layers.1.post_attention_layernorm", "prefill",
                      "doubled_residual", "twice", O_PROJ.replace("layers.0", "layers.1")),
    "vocabulary part": (with_weight("model.embed_tokens", lambda w: w * (np.arange(VOCABULARY) < 41)[:, None]),
                        "model.embed_tokens", "prefill", "embedding_shard", "last_id", 40),
    "shards": (with_weight("lm_head", lambda w: np.roll(w, VOCABULARY // 2, 0)), "lm_head", "prefill",
               "vocabulary_shards", "n_ranges", 2),
    "last token": (lambda p: {"logits": lambda x: np.concatenate([x[:1], x[:-1]])}, "lm_head", "prefill", "token_shift",
                   "shift", -1),
    "softcap": (lambda p: {"logits": lambda x: 5 * np.tanh(x / 5)}, "lm_head", "prefill", "output_softcap", "softcap",
                pytest.approx(5.0, rel=0.01)),
    "clipped": (lambda p: {"logits": lambda x: np.clip(x, -1.0, 1.0)}, "lm_head", "prefill", "clipped_values", "high",
                1.0),
    "lost shard": (lambda p: {"logits": lambda x: x * (np.arange(VOCABULARY) < 48)}, "lm_head", "prefill", "lost_shard",
                   "features", 16),
    "rank 0": (lambda p: {"logits": lambda x: np.tile(x[:, :16], 4)}, "lm_head", "prefill", "same_shard_everywhere",
               "parts", 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Port]:
    """Reference and baseline."""
    trace = Trace.create(tmp_path_factory.mktemp("decoder") / "trace")
    return trace, references(trace)


def findings(trace: Trace, port: Port, run: str) -> list[Finding]:
    """What the whole pipeline says."""
    record(trace, run, replace(port, sites={}))
    compare(trace, ComparisonRequest("fp32", run, "bf16"))
    return diagnose(trace, run)


def examined(trace: Trace, port: Port, run: str, site: str, phase: str = "prefill") -> Finding:
    """What is said about one site, without measuring all of them first."""
    record(trace, run, replace(port, sites={}))
    return examined_run(trace, run, site, phase)


def examined_run(trace: Trace, run: str, site: str, phase: str = "prefill") -> Finding:
    """What is said about one site of a recorded run, of a trace with `fp32` and `bf16`."""
    names = [info.site.name for info in sites_of(trace, "fp32")]
    with catalog.writing(trace.catalog_path) as connection:
        connection.execute("DELETE FROM comparisons WHERE comparison = ?", [run])
        connection.execute("DELETE FROM mapping_entries WHERE mapping = ?", [run])
        connection.execute(
            """INSERT INTO comparisons BY NAME SELECT $1 AS comparison, 'fp32' AS reference, 'bf16' AS baseline,
               $1 AS target, $1 AS mapping, '{}' AS thresholds, current_timestamp AS created_at, 'fail' AS verdict,
               [] AS reasons, 0 AS n_matched, 0 AS n_unmatched, 0 AS n_skipped""",
            [run],
        )
        connection.execute(
            """INSERT INTO mapping_entries BY NAME SELECT $1 AS mapping, 0 AS entry, [site] AS reference_sites,
               [site] AS target_sites, 'identity' AS transform, 1.0 AS score, '' AS reason
               FROM (SELECT unnest($2::VARCHAR[]) AS site)""",
            [run, names],
        )
    return examine(ComparedRuns(trace, run), Origin(site, site, phase, None, "measured", ""), 1)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_named_with_its_number(bug: str, recorded: tuple[Trace, Port]) -> None:
    trace, port = recorded
    change, site, phase, cause, parameter, value = BUGS[bug]
    found = examined(trace, replace(port, **change(port)), bug.replace(" ", "-"), site, phase)
    assert found.cause == cause, found
    assert found.confidence > 0.1
    assert found.evidence["residual_ratio"] < 2.0
    if parameter:
        told = found.evidence["parameters"][parameter]
        assert told == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)


def test_a_correct_port_has_no_findings(recorded: tuple[Trace, Port]) -> None:
    trace, port = recorded
    assert findings(trace, port, "clean") == []


def strange(x: Array) -> Array:
    return x + 0.2 * np.sin(3 * x) * np.roll(x, 1, axis=-1)


@pytest.mark.parametrize(
    ("change", "site"),
    [
        ({"act": lambda x: np.asarray(x / (1 + np.exp(-1.2 * x)))}, "model.layers.0.mlp.act_fn"),
        ({"norm": lambda x, w, keep: norm(strange(x), w, keep)}, NORM),
        ({"mixed": strange}, O_PROJ),
        ({"logits": strange}, "lm_head"),
        ({"embed": strange}, "model.embed_tokens"),
        ({"angles": lambda p: angles(p + 0.3 * np.sin(p))}, ROTARY),
        ({"add": lambda layer, a, b: a + strange(b)}, "model.layers.0.post_attention_layernorm"),
    ],
    ids=["activation", "norm", "attention", "logits", "embedding", "rotary", "residual"],
)
def test_a_bug_that_nobody_has_thought_of_gets_no_name(
    change: dict[str, Any], site: str, recorded: tuple[Trace, Port], request: pytest.FixtureRequest
) -> None:
    trace, port = recorded
    found = examined(trace, replace(port, **change), f"strange-{request.node.callspec.id}", site)
    assert (found.cause, found.confidence, found.entry) == ("unknown", 0.0, "")
    assert "best guess" in found.summary or "explain it equally well" in found.summary


def test_a_site_that_only_passes_on_an_error_is_called_inherited(recorded: tuple[Trace, Port]) -> None:
    trace, port = recorded
    changed = replace(port, norm=norm_with(1e-2))
    for number, site in enumerate(("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.act_fn", O_PROJ)):
        assert examined(trace, changed, f"inherits-{number}", site).cause == "inherited"


def test_values_that_are_not_finite_are_named_with_their_position(recorded: tuple[Trace, Port]) -> None:
    trace, port = recorded

    def divided(x: Array) -> Array:
        x = x.copy()
        x[3, 5] = np.nan
        return x

    broken = replace(port, act=lambda x: divided(x / (1 + np.exp(-x))))
    first = examined(trace, broken, "nan", "model.layers.0.mlp.act_fn")
    assert first.cause == "nonfinite"
    assert first.evidence["where"]["first_position"] == 3


def test_the_pipeline_keeps_its_findings_and_prints_them(
    recorded: tuple[Trace, Port], capsys: pytest.CaptureFixture[str]
) -> None:
    trace, port = recorded
    first = findings(trace, replace(port, norm=norm_with(1e-2)), "kept")[0]
    assert (first.site, first.phase, first.cause) == (NORM, "prefill", "norm_epsilon")
    assert main(["diagnose", str(trace.path), "kept"]) == 1
    shown = capsys.readouterr().out
    for part in ("norm epsilon", NORM, "0.01 instead of 1e-05", "the noise", "rms_norm_eps", "kb show norm-epsilon"):
        assert part in shown
    rows = trace.query("SELECT * FROM findings WHERE comparison = 'kept' AND rank = 1").to_pylist()
    assert [(row["cause"], row["entry"]) for row in rows] == [("norm_epsilon", "norm-epsilon")]
    assert json.loads(rows[0]["evidence"])["parameters"]["epsilon"] == 1e-2
    assert main(["diagnose", str(trace.path), "kept", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["cause"] == "norm_epsilon"
    assert main(["diagnose", str(trace.path), "nothing"]) == 2
    with pytest.raises(TraceNotFoundError, match="kept"):
        diagnose(trace, "nothing")


def noisy(seed: int) -> Callable[[Array], Array]:
    noise = np.random.default_rng(seed)
    return lambda x: x * (1 + 0.02 * noise.standard_normal(x.shape))


@pytest.fixture(scope="module")
def scattered(recorded: tuple[Trace, Port]) -> tuple[Trace, Port]:
    """With two replicates whose logits scatter by 2 %, so that an R of 1.5 there is nothing unusual."""
    trace, port = recorded
    for seed in (1, 2):
        record(trace, f"replicate-{seed}", replace(port, logits=noisy(seed), sites={}))
    return trace, port


def findings_in_noise(trace: Trace, port: Port, run: str) -> list[Finding]:
    record(trace, run, replace(port, sites={}))
    request = ComparisonRequest("fp32", run, "bf16", replicates=("replicate-1", "replicate-2"))
    assert compare(trace, request).verdict != "fail"
    statement = "SELECT max(r_ratio) AS r FROM measurements WHERE comparison = ? AND prompt IS NULL"
    assert trace.query(statement, [run]).to_pylist()[0]["r"] > 1.2
    return diagnose(trace, run)


def test_a_bug_as_small_as_noise_is_convicted_by_its_cause(
    scattered: tuple[Trace, Port], capsys: pytest.CaptureFixture[str]
) -> None:
    trace, port = scattered
    (found,) = findings_in_noise(trace, replace(port, logits=lambda x: 1.02 * x), "small")
    assert (found.site, found.cause, found.evidence["in_noise"]) == ("lm_head", "multiplier", True)
    assert found.evidence["parameters"]["factor"] == pytest.approx(1.02, rel=1e-3)
    assert main(["localize", str(trace.path), "small"]) in (0, 3)
    assert "sites may inject error of the size of noise, first lm_head" in capsys.readouterr().out
    assert main(["diagnose", str(trace.path), "small"]) == 1
    assert "alone could be noise" in capsys.readouterr().out


def test_noise_of_the_same_size_has_no_cause(scattered: tuple[Trace, Port]) -> None:
    trace, port = scattered
    assert findings_in_noise(trace, replace(port, logits=noisy(3)), "noise") == []


def test_without_matrices_they_are_estimated_from_the_reference(tmp_path: Path) -> None:
    trace = Trace.create(tmp_path / "trace")
    port = references(trace, matrices=False)
    for name, change, site, cause in (
        ("scale", {"scale": 1.0 / DIM}, O_PROJ, "attention_scale"),
        ("reduce", {"project": partial_down}, DOWN, "missing_all_reduce"),
        ("int4", with_weight(DOWN, int4)(port), DOWN, "quantised_weights"),
    ):
        assert examined(trace, replace(port, **change), name, site).cause == cause
    assert trace.query("SELECT count(*) AS n FROM tensors WHERE phase = 'static' AND len(shape) > 1").to_pylist() == [
        {"n": 0}
    ]


def test_the_config_is_needed_for_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numpy_decoder.CONFIG", {})
    trace = Trace.create(tmp_path / "trace")
    port = references(trace)
    first = examined(trace, replace(port, embed=lambda x: x * HIDDEN**0.5), "scaled", "model.embed_tokens")
    assert (first.cause, first.evidence["parameters"]["equals"]) == ("multiplier", [])
    assert CONFIG


def test_another_size_is_named_and_sizes_that_depend_on_the_data_are_not(tmp_path: Path) -> None:
    trace = Trace.create(tmp_path / "trace")
    tokens = {0: [1, 2, 3], 1: [4, 5, 6]}
    for run, role, wide in (("fp32", "reference", 8), ("bf16", "baseline", 8), ("port", "target", 6)):
        tensors = [Tensor("model.norm", np.ones((1, 3, wide), np.float32), 0, prompt=prompt) for prompt in tokens]
        for prompt in tokens:
            rows = np.ones((2 + prompt + (role == "target"), 4), np.float32)
            tensors.append(Tensor("expert", rows, None, prompt=prompt, order=1))
        add_run(trace, run, tensors, role=role, tokens=tokens)
    compare(trace, ComparisonRequest("fp32", "port", "bf16"))
    found = {finding.site: finding for finding in diagnose(trace, "port")}
    assert found["model.norm"].cause == "shape_mismatch"
    assert all(finding.cause == "unknown" for site, finding in found.items() if site == "expert")
