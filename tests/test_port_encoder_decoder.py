"""Ports of encoder-decoders: what is found out about them, the text of their ports, and their numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorsleuth.analyze.sql_library import run_sql
from tensorsleuth.capture.generate import source_of
from tensorsleuth.capture.prompts import EncodedPrompt, PromptInput, encode_prompts, read_prompts
from tensorsleuth.cli.app import main
from tensorsleuth.porting.generator.generate import generate, modeling_text, write_port
from tensorsleuth.porting.parity.gate import ParityGate, Setting
from tensorsleuth.porting.spec.checkpoint import checkpoint_keys
from tensorsleuth.porting.spec.document import from_json, json_schema, leaves, origin_of, to_json
from tensorsleuth.porting.spec.encoder_decoder import analyse_encoder_decoder
from tensorsleuth.porting.spec.encoder_decoder_facts import EncoderDecoder
from tensorsleuth.porting.spec.extract import check_checkpoint
from tensorsleuth.porting.spec.hostile import hostile_model
from tensorsleuth.porting.spec.relative_positions import bias_by_distance, buckets_of
from tensorsleuth.store import InputError
from transformers import BartConfig, T5Config, UMT5Config
from transformers.models.t5.modeling_t5 import T5Attention

GOLDEN = Path(__file__).parent / "golden" / "ports"
GATED = T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
needs_sources = pytest.mark.skipif(
    not (os.environ.get("NXDI_SRC") and os.environ.get("NXD_SRC")),
    reason="needs the NxD Inference sources: set NXDI_SRC and NXD_SRC to checkouts of them",
)


@pytest.fixture(scope="module")
def plain() -> EncoderDecoder:
    """T5 1.0: one table for tokens and logits, no gate."""
    return analyse_encoder_decoder(T5Config())


@pytest.fixture(scope="module")
def gated() -> EncoderDecoder:
    """T5 1.1, as Flan-T5."""
    return analyse_encoder_decoder(GATED)


@pytest.fixture(scope="module")
def every_layer() -> EncoderDecoder:
    """UMT5: a table of distances in every layer."""
    return analyse_encoder_decoder(UMT5Config())


def test_what_t5_is(plain: EncoderDecoder) -> None:
    encoder, decoder = plain.encoder, plain.decoder
    assert [node.role for node in decoder.layer.nodes] == [
        "norm",
        "attention",
        "norm",
        "cross_attention",
        "norm",
        "feed_forward",
    ]
    assert encoder.cross is None
    assert decoder.cross is not None
    assert decoder.cross.module == "layer.1.EncDecAttention"
    assert (encoder.attention.mask[0].kind, decoder.attention.mask[0].kind) == ("full", "causal")
    assert encoder.attention.scale.expression == "1.0"  # T5 does not divide scores
    assert encoder.attention.head_dim.expression == "config.d_kv"
    assert encoder.n_layers.expression == "config.num_layers"
    assert decoder.n_layers.expression == "config.num_decoder_layers"
    assert (encoder.norm.kind, encoder.norm.offset, encoder.norm.bias) == ("rms", 0.0, False)
    assert encoder.positions is not None
    assert decoder.positions is not None
    assert (encoder.positions.bidirectional, decoder.positions.bidirectional) == (True, False)
    assert encoder.positions.shared


def test_what_differs_between_the_t5s(
    plain: EncoderDecoder, gated: EncoderDecoder, every_layer: EncoderDecoder
) -> None:
    assert plain.head.tied
    assert plain.head.factor is not None
    assert plain.head.factor.expression == "config.d_model ** -0.5"
    assert (gated.head.tied, gated.head.factor) == (False, None)
    assert (plain.encoder.feed_forward.kind, plain.encoder.feed_forward.activation_name) == ("plain", "relu")
    assert (gated.encoder.feed_forward.kind, gated.encoder.feed_forward.activation_name) == ("gated", "gelu_new")
    assert every_layer.decoder.positions is not None
    assert not every_layer.decoder.positions.shared


def test_every_fact_says_where_it_comes_from(gated: EncoderDecoder) -> None:
    without = [field for field, _ in leaves(gated) if not origin_of(gated, field)]
    assert without == []
    bias = origin_of(gated, "decoder.positions.module")
    assert bias.startswith("measured: what is added to scores")
    assert "transformers/models/t5/modeling_t5.py:" in bias


def test_descriptions_are_read_back(gated: EncoderDecoder) -> None:
    assert from_json(to_json(gated)) == gated
    assert "EncoderDecoder" in json_schema()["$defs"]
    with pytest.raises(InputError, match="surprise"):
        from_json(json.dumps({**json.loads(to_json(gated)), "surprise": 1}))


def test_what_is_not_understood_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BartConfig().save_pretrained(tmp_path)
    assert main(["port", "analyze", str(tmp_path)]) == 2
    assert "unsupported: " in capsys.readouterr().err
    packed = T5Config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(InputError, match="unsupported: packed weights in encoder-decoders"):
        analyse_encoder_decoder(packed)


def test_checkpoints_are_checked_by_name_and_shape(tmp_path: Path, gated: EncoderDecoder) -> None:
    model = hostile_model(GATED)
    model.save_pretrained(tmp_path)
    keys = checkpoint_keys(tmp_path)
    assert keys is not None
    check_checkpoint(gated, model.config, keys)
    lost = "decoder.block.1.layer.1.EncDecAttention.q.weight"
    with pytest.raises(InputError, match=rf"lacks 1 weights of T5ForConditionalGeneration: {lost}"):
        check_checkpoint(gated, model.config, {name: shape for name, shape in keys.items() if name != lost})
    with pytest.raises(InputError, match=r"unsupported: checkpoint weight decoder\.adapter\.weight is none of"):
        check_checkpoint(gated, model.config, {**keys, "decoder.adapter.weight": (2,)})


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 4), length=st.integers(3, 12), factor=st.floats(0.05, 3.0), causal=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_bias_by_distance_is_told_from_the_factor(
    heads: int, length: int, factor: float, causal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    products = torch.randn(2, heads, length, length, generator=generator)
    bias = torch.randn(heads, 2 * length - 1, generator=generator).double()
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    scores = factor * products + bias[:, distance + length - 1]
    visible = distance <= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    found = bias_by_distance(products, scores, visible)
    assert found is not None
    assert found[0] == pytest.approx(factor, rel=1e-5)
    known = ~found[1].isnan().any(0)
    assert known.sum() == (length if causal else 2 * length - 1)
    torch.testing.assert_close(found[1][:, known], bias[:, known], rtol=1e-4, atol=1e-4)
    scrambled = scores + torch.randn(scores.shape, generator=generator)
    assert bias_by_distance(products, scrambled, visible) is None


@given(buckets=st.sampled_from([8, 12, 32]), limit=st.integers(13, 130), bidirectional=st.booleans())
def test_buckets_are_transformers(buckets: int, limit: int, bidirectional: bool) -> None:
    distances = torch.arange(-200, 201)
    expected = T5Attention._relative_position_bucket(distances, bidirectional, buckets, limit)
    assert torch.equal(buckets_of(distances, buckets, limit, bidirectional), expected)


def test_the_port_is_as_reviewed(gated: EncoderDecoder) -> None:
    file = GOLDEN / "modeling_t5.py"
    assert modeling_text(gated) == file.read_text(), f"the port changed: review it, then write it to {file}"


def test_a_port_holds_only_what_its_model_needs(
    plain: EncoderDecoder, gated: EncoderDecoder, every_layer: EncoderDecoder
) -> None:
    port = generate(plain)
    assert port.reference == "neuron_port/modeling_t5.py:NeuronT5ForConditionalGeneration"
    assert "self.logit_factor = config.d_model**-0.5" in modeling_text(plain)
    assert "logit_factor" not in modeling_text(gated)
    assert "layer.relative_bias(" in modeling_text(every_layer)
    assert "self.relative_bias(" not in modeling_text(every_layer)
    assert "SDK 2.28" in modeling_text(gated, "2.28").splitlines()[0]
    different = dataclasses.replace(gated.decoder, feed_forward=plain.decoder.feed_forward)
    with pytest.raises(InputError, match="unsupported: encoder and decoder with different feed-forward blocks"):
        generate(dataclasses.replace(gated, decoder=different))


def test_prompts_of_encoder_decoders(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"token_ids": [5, 6, 7]}\n{"token_ids": [8], "decoder_ids": [0, 9]}\n')
    first, second = encode_prompts(read_prompts(file), None, vocabulary=10, start=0)
    assert (first.token_ids, first.source_ids) == ((0,), (5, 6, 7))
    assert (second.token_ids, second.source_ids) == ((0, 9), (8,))
    with pytest.raises(InputError, match="has decoder_ids, but the model has no encoder"):
        encode_prompts([PromptInput("a", token_ids=(1,), decoder_ids=(2,))], None, vocabulary=10)


def test_a_source_is_never_as_long_as_what_the_decoder_begins_with() -> None:
    batch = [EncodedPrompt("a", None, (1, 2, 3), source_ids=(4, 5, 6)), EncodedPrompt("b", None, (1,), source_ids=(7,))]
    source = source_of(batch, 3)
    assert source is not None
    assert source.ids.tolist() == [[4, 5, 6, 0], [7, 0, 0, 0]]
    assert source.mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


_ERRORS = """
import json, sys, warnings
from dataclasses import replace
from pathlib import Path
import torch
from transformers import T5Config, UMT5Config
from tensorsleuth.capture.hf import quiet_transformers
from tensorsleuth.porting.generator.generate import generate, write_port
from tensorsleuth.porting.lint.coverage import check_coverage
from tensorsleuth.porting.parity.direct import logit_errors
from tensorsleuth.porting.spec.encoder_decoder import analyse_encoder_decoder
from tensorsleuth.porting.spec.hostile import hostile_model

warnings.simplefilter("ignore")
quiet_transformers()
folder, found = Path(sys.argv[1]), {}

def errors(name, model, spec):
    port = generate(spec)
    file = write_port(port, folder / name)
    file = file.rename(file.with_name(f"port_{name}.py"))
    both = logit_errors(model, f"{file}:{port.class_name}")
    found[name] = [both.prefill, both.decode]
    return f"{file}:{port.class_name}"

for name, config in (("plain", T5Config()), ("every_layer", UMT5Config())):
    model, spec = hostile_model(config), analyse_encoder_decoder(config)
    port = errors(name, model, spec)
    if name == "plain":
        model.save_pretrained(folder / "checkpoint")
        found["problems"] = [problem.message for problem in check_coverage(port, folder / "checkpoint")]
        encoder, decoder = spec.encoder, spec.decoder
        turned = replace(decoder, positions=replace(decoder.positions, bidirectional=True))
        errors("turned", model, replace(spec, decoder=turned))
        errors("no_encoder_bias", model, replace(spec, encoder=replace(encoder, positions=None)))
        errors("no_factor", model, replace(spec, head=replace(spec.head, factor=None)))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Relative L2 distance of logits at prefill and decode: of right ports, and of ports with one wrong fact."""
    command = [sys.executable, "-c", _ERRORS, str(tmp_path_factory.mktemp("ports"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_sources
@pytest.mark.parametrize("name", ["plain", "every_layer"])
def test_a_port_computes_its_models_logits(name: str, errors: dict[str, list[float]]) -> None:
    assert max(errors[name]) < 1e-5


@needs_sources
def test_both_conversions_together_use_every_weight(errors: dict[str, list[float]]) -> None:
    assert errors["problems"] == []


@needs_sources
@pytest.mark.parametrize("name", ["turned", "no_encoder_bias", "no_factor"])
def test_a_wrong_fact_shows_in_logits(name: str, errors: dict[str, list[float]]) -> None:
    assert min(errors[name]) > 1e-3


@needs_sources
def test_the_gate_names_where_a_port_without_bias_diverges(tmp_path: Path, gated: EncoderDecoder) -> None:
    gate = ParityGate(gated, GATED, tmp_path, prompts=(4, 9))
    wrong = dataclasses.replace(gated, decoder=dataclasses.replace(gated.decoder, positions=None))
    file = write_port(generate(wrong), tmp_path)
    found = gate.check(f"{file}:NeuronT5ForConditionalGeneration", Setting("float32", 2))
    assert found.verdict == "fail"
    assert found.first_divergent == "decoder.block.0.layer.0.SelfAttention.o (prefill)"
    assert found.n_sites > 80
    assert found.n_unmatched == 0
    before = run_sql(
        gate.trace,
        """SELECT count(*) AS sites, max(relative_l2) AS worst FROM measurements
           WHERE prompt IS NULL AND (phase = 'encode' OR phase = 'prefill' AND site LIKE 'decoder.block.0.layer.0.%._')
           AND NOT site LIKE '%.o'""",
    ).to_pylist()[0]
    assert before["sites"] > 20  # the encoder on two ranks, one of which holds a head of zeros, and what comes first
    assert before["worst"] < 1e-5
