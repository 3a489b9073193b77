"""The example model is a real one, the stand-in is faithful to it, and every planted bug shows where it says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorsleuth.examples import stand_in
from tensorsleuth.examples.faults import FAULTS
from tensorsleuth.examples.stand_in_layers import AttentionOutput
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

FOLDER = Path(stand_in.__file__).parent / "tiny-llama"
PROMPTS = [json.loads(line)["text"] for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
GENERATED = 16
LIMIT = 1.2


@dataclass
class Recording:
    """Values of every site, pooled over prompts: (phase, site) to one [rows, width] tensor per forward call."""

    phase: str = "prefill"
    values: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)

    def add(self, site: str, tensor: Tensor) -> None:
        self.values.setdefault((self.phase, site), []).append(tensor.flatten(0, -2).double())


@dataclass(frozen=True)
class Site:
    """Errors of one site against the reference, in dataflow order, prefill before decode."""

    phase: str
    name: str
    reference: float
    baseline: float
    target: float

    @property
    def ratio(self) -> float:
        """R; 1 where both runs are exact."""
        return 1.0 if self.target == self.baseline else self.target / (self.baseline + 1e-12 * self.reference)


def activations(output: Any) -> Tensor | None:
    """Return the activations in a module's output of either implementation, [..., width].

    A tuple of nothing but activations, (Q, K, V) or (cos, sin), is joined; from any other the first is taken.
    """
    if isinstance(output, tuple):
        tensors = [item for item in output if isinstance(item, Tensor)]
        return torch.cat(tensors, -1) if len(tensors) == len(output) else tensors[0]
    if isinstance(output, Tensor):
        return output
    return getattr(output, "hidden_states" if isinstance(output, AttentionOutput) else "logits", None)


def record(model: nn.Module) -> Recording:
    """Hook every module of ``model``; its outputs are added to the recording as it runs."""
    recording = Recording()

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = activations(output)
            if tensor is not None:
                recording.add(name, tensor)

        return keep

    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(hook(name))
    return recording


def load_reference(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()


@torch.no_grad()
def record_transformers(dtype: torch.dtype, texts: list[tuple[Tensor, Tensor]]) -> Recording:
    model = load_reference(dtype)
    recording = record(model)
    for prompt, forced in texts:
        cache = DynamicCache(config=model.config)
        recording.phase = "prefill"
        model(input_ids=prompt, past_key_values=cache)
        recording.phase = "decode"
        for token in forced[0, :-1]:
            model(input_ids=token.view(1, 1), past_key_values=cache)
    return recording


@torch.no_grad()
def record_stand_in(
    dtype: torch.dtype, texts: list[tuple[Tensor, Tensor]], fault: str | None = None, *, decode: bool = True
) -> Recording:
    model = stand_in.load(FOLDER, dtype, fault)
    recording = record(model)
    for prompt, forced in texts:
        length = prompt.shape[1]
        recording.phase = "prefill"
        cache = model(prompt, torch.arange(length)[None]).cache
        recording.phase = "decode"
        for step, token in enumerate(forced[0, :-1] if decode else []):
            cache = model(token.view(1, 1), torch.tensor([[length + step]]), cache=cache).cache
    return recording


def of_reference(site: str, phase: str, recording: Recording) -> list[Tensor]:
    """Return what transformers shows for a site of the stand-in."""
    if site.endswith(("qkv_proj", "Wqkv")):
        attention = site.split(".qkv_proj")[0]
        parts = [of_reference(f"{attention}.{letter}_proj", phase, recording) for letter in "qkv"]
        return [torch.cat(each, -1) for each in zip(*parts, strict=True)]
    if site.endswith("rotary_emb"):
        return recording.values[phase, "model.rotary_emb"]
    if site in ("", "lm_head"):
        return [tensor[-1:] for tensor in recording.values[phase, site]]
    return recording.values[phase, f"model.{site}"]


def compare(reference: Recording, baseline: Recording, target: Recording) -> list[Site]:
    def distance(one: list[Tensor], other: list[Tensor]) -> float:
        return math.sqrt(sum((a - b).square().sum().item() for a, b in zip(one, other, strict=True)))

    sites = []
    for (phase, name), values in target.values.items():
        truth = of_reference(name, phase, reference)
        norm = distance(truth, [torch.zeros_like(tensor) for tensor in truth])
        usual = distance(of_reference(name, phase, baseline), truth)
        sites.append(Site(phase, name, norm, usual, distance(values, truth)))
    return sorted(sites, key=lambda site: site.phase == "decode")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep the tiny products on one thread: two that share a busy core wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts() -> list[tuple[Tensor, Tensor]]:
    """Prompts and what the FP32 model continues them with, each [1, n]."""
    model, tokenizer = load_reference(torch.float32), AutoTokenizer.from_pretrained(FOLDER)
    pairs = []
    for text in PROMPTS:
        prompt = tokenizer(text, return_tensors="pt")
        length = prompt["input_ids"].shape[1]
        tokens = model.generate(**prompt, min_new_tokens=GENERATED, max_new_tokens=GENERATED)
        pairs.append((prompt["input_ids"], tokens[:, length:]))
    return pairs


@pytest.fixture(scope="module")
def reference(texts: list[tuple[Tensor, Tensor]]) -> Recording:
    return record_transformers(torch.float32, texts)


@pytest.fixture(scope="module")
def baseline(texts: list[tuple[Tensor, Tensor]]) -> Recording:
    return record_transformers(torch.bfloat16, texts)


@pytest.fixture(scope="module")
def clean(texts: list[tuple[Tensor, Tensor]], reference: Recording, baseline: Recording) -> list[Site]:
    return compare(reference, baseline, record_stand_in(torch.bfloat16, texts))


def test_the_model_continues_prompts_with_english_words() -> None:
    model, tokenizer = load_reference(torch.float32), AutoTokenizer.from_pretrained(FOLDER)
    frequent = {"the", "of", "is", "a", "to", "and", "in", "for", "with", "that"}
    for text in ("Return True if ", "The value of the ", "This method is called when "):
        prompt = tokenizer(text, return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=80)
        words = re.findall("[a-z]+", tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :]))
        assert len(frequent.intersection(words)) >= 2, words


def test_the_weights_are_bf16_values_and_norm_gains_are_trained() -> None:
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    gains = [tensor.float() for name, tensor in weights.items() if "norm" in name]
    assert all((gain - 1).abs().mean() > 0.02 for gain in gains)


def test_the_tokenizer_maps_bytes_to_ids_and_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "Zürich: x <= 10\n\ttab"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_cos_and_sin_carry_the_attention_factor() -> None:
    rotary = load_reference(torch.float32).model.rotary_emb
    cos, _ = rotary(torch.zeros(1), torch.zeros(1, 1, dtype=torch.long))
    assert cos.max().item() == pytest.approx(0.1 * math.log(4) + 1)


def test_in_fp32_the_stand_in_equals_transformers(
    texts: list[tuple[Tensor, Tensor]], reference: Recording, baseline: Recording
) -> None:
    for site in compare(reference, baseline, record_stand_in(torch.float32, texts)):
        assert site.target <= 1e-5 * site.reference, site


def test_the_stand_in_has_the_modules_of_a_port(clean: list[Site]) -> None:
    names = {site.name for site in clean}
    layer = {
        "input_layernorm", "self_attn", "self_attn.qkv_proj", "self_attn.qkv_proj.Wqkv", "self_attn.o_proj",
        "post_attention_layernorm", "mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj",
    }  # fmt: skip
    expected = {"", "embed_tokens", "norm", "lm_head", "layers.0.self_attn.rotary_emb"}
    expected |= {f"layers.{i}" for i in range(4)} | {f"layers.{i}.{name}" for i in range(4) for name in layer}
    assert names == expected


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_clean_bf16_port_stays_near_one(clean: list[Site], phase: str) -> None:
    for site in clean:
        if site.phase == phase:
            assert 0.8 < site.ratio < LIMIT, site


def test_a_row_padded_on_the_right_gives_the_logits_of_the_row_alone() -> None:
    model = stand_in.load(FOLDER, torch.float32)
    long, short = torch.randint(256, (1, 12)), torch.randint(256, (1, 7))
    padded = torch.cat([long, torch.cat([short, torch.full((1, 5), 258)], 1)])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    both = model(padded, torch.arange(12).expand(2, -1), mask)
    alone = model(short, torch.arange(7)[None])
    torch.testing.assert_close(both.logits[1:], alone.logits, atol=1e-4, rtol=1e-4)

    token = torch.tensor([[65], [66]])
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
    both = model(token, torch.tensor([[12], [7]]), mask, both.cache)
    alone = model(token[1:], torch.tensor([[7]]), cache=alone.cache)
    torch.testing.assert_close(both.logits[1:], alone.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_first_shows_at_its_site(
    name: str, texts: list[tuple[Tensor, Tensor]], reference: Recording, baseline: Recording
) -> None:
    fault = FAULTS[name]
    target = record_stand_in(torch.bfloat16, texts, name, decode=fault.phase == "decode")
    sites = compare(reference, baseline, target)
    index = next(i for i, site in enumerate(sites) if site.ratio > LIMIT)
    first = sites[index]
    assert (first.phase, fnmatch(first.name, fault.site)) == (fault.phase, True), first
    assert all(site.ratio > 0.8 for site in sites[:index])


def test_an_unknown_fault_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ValueError, match="attention-scale"):
        stand_in.load(FOLDER, torch.float32, fault="no-such-fault")


def test_every_fault_is_documented() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \| `(\S+)` \| (\w+) \|$", readme, re.MULTILINE)
    assert rows == [(fault.name, fault.description, fault.site, fault.phase) for fault in FAULTS.values()]
