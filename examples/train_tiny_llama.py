"""Train the byte-level Llama in ``tiny-llama/`` on the prose that ships with Python.

The text is the language reference in :mod:`pydoc_data.topics`, the docstrings of the standard library and the Zen
of Python: English, present wherever Python is, and fixed for one Python release. On one kind of CPU a run is
determined by the seed, the Python release and the number of threads::

    python -m tensorsleuth.examples.train_tiny_llama --steps 2400 --out tiny-llama

Weights are rounded to BF16 before they are saved, as released checkpoints are. An FP32 and a BF16 run of the
model then start from the same numbers, and everything by which they differ comes from arithmetic.
"""

from __future__ import annotations

import argparse
import ast
import codecs
import contextlib
import hashlib
import importlib
import io
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END, PAD, UNKNOWN = "<|begin|>", "<|end|>", "<|pad|>", "<|unknown|>"
BEGIN_ID, END_ID, PAD_ID, UNKNOWN_ID = 256, 257, 258, 259
CONTEXT = 256
BATCH = 32
PEAK_RATE = 3e-3
FINAL_RATE = 3e-5
WARMUP_STEPS = 100
HELD_OUT_EVERY = 40
SAMPLE_PROMPTS = ("Return True if ", "The value of the ", "If the argument ")


def build_config() -> LlamaConfig:
    """Return the shape of the model: 4 layers, 8 query heads over 4 KV heads, YaRN on a 256-position base.

    YaRN's attention factor, ``0.1 ln(factor) + 1`` = 1.139 (Peng et al. 2023, arXiv:2309.00071, section 3.4),
    multiplies cos and sin, so the model depends on a multiplier that a port can forget.
    """
    return LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids 0..255 are the bytes of UTF-8.

    ``<|begin|>`` marks where a document starts in training and is not put before prompts: the model answers it
    with activations so large that this one row, equal in all prompts, would be half of the BF16 error of a site.
    """
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    vocabulary |= {BEGIN: BEGIN_ID, END: END_ID, PAD: PAD_ID, UNKNOWN: UNKNOWN_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def documents() -> Iterator[str]:
    """Yield the training texts in a fixed order, as prose paragraphs joined by blank lines."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints itself
        zen = importlib.import_module("this")
    texts = [codecs.decode(zen.s, "rot13")]
    texts += [text for _, text in sorted(topics.topics.items())]
    texts += list(_docstrings(Path(sysconfig.get_path("stdlib"))))
    seen: set[str] = set()
    for text in texts:
        paragraphs = [p for p in _prose(text) if p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            yield "\n\n".join(paragraphs)


def train(steps: int, seed: int, out: Path) -> None:
    """Train, round the weights to BF16, and write the model folder.

    Args:
        steps: optimiser steps of ``BATCH`` x ``CONTEXT`` bytes each.
        seed: seeds the weights and the order of the text.
        out: folder to write; created where absent.
    """
    torch.manual_seed(seed)
    texts = list(documents())
    training, held_out = _encode(texts, held_out=False), _encode(texts, held_out=True)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    model = LlamaForCausalLM(build_config())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(training)} bytes to learn, {len(held_out)} held out, {digest[:16]}")
    optimiser = _optimiser(model)
    shuffle = torch.Generator().manual_seed(seed)
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        rate = _learning_rate(step, step / steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = _loss(model, _batch(training, shuffle))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            elapsed = time.monotonic() - started
            print(f"step {step} loss {recent:.3f} rate {rate:.2e} {elapsed:.0f} s", flush=True)
    model = model.eval().to(torch.bfloat16)
    _save(model, out)
    exact = model.float()
    report = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "seed": seed,
        "steps": steps,
        "parameters": parameters,
        "training_bytes": len(training),
        "text_sha256": digest,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "training_loss": round(evaluate(exact, training[: len(held_out)]), 4),
        "held_out_loss": round(evaluate(exact, held_out), 4),
        "samples": {prompt: sample(exact, prompt) for prompt in SAMPLE_PROMPTS},
    }
    print(json.dumps(report, indent=2))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: Tensor) -> float:
    """Return the mean loss in nats per byte over consecutive windows of ``stream`` ([n] token ids)."""
    count = len(stream) // (CONTEXT + 1)
    windows = stream[: count * (CONTEXT + 1)].view(count, CONTEXT + 1)
    total = 0.0
    for start in range(0, count, BATCH):
        chunk = windows[start : start + BATCH]
        total += _loss(model, chunk).item() * len(chunk)
    return total / count


def sample(model: LlamaForCausalLM, prompt: str, length: int = 120) -> str:
    """Return the greedy continuation of ``prompt``, ``length`` bytes at most."""
    inputs = build_tokenizer()(prompt, return_tensors="pt")
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=PAD_ID,
    )
    text = build_tokenizer().decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


def _byte_alphabet() -> list[str]:
    """Return the printable character that ByteLevel uses for each byte (GPT-2's table), indexed by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet, extra = [], 0
    for byte in range(256):
        alphabet.append(chr(byte) if byte in printable else chr(256 + extra))
        extra += byte not in printable
    return alphabet


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib"} & set(inside):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield text


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs that read as English, each on one line: no tables, grammars or code."""
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line) >= 50 and line.isascii() and letters >= 0.9 * len(line) and ">>>" not in line:
            yield line


def _encode(texts: list[str], *, held_out: bool) -> Tensor:
    """Return one stream of token ids, [n], of the texts on one side of the split."""
    ids: list[int] = []
    for index, text in enumerate(texts):
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out:
            ids += [BEGIN_ID, *text.encode(), END_ID]
    return torch.tensor(ids)


def _batch(stream: Tensor, shuffle: torch.Generator) -> Tensor:
    starts = torch.randint(len(stream) - CONTEXT - 1, (BATCH, 1), generator=shuffle)
    return stream[starts + torch.arange(CONTEXT + 1)]


def _loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of predicting each next token of ``tokens`` ([b, s + 1])."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _optimiser(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def _learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine from ``PEAK_RATE`` to ``FINAL_RATE`` over ``progress`` 0..1."""
    cosine = FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    return cosine * min(1.0, (step + 1) / WARMUP_STEPS)


def _save(model: LlamaForCausalLM, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=BEGIN_ID, eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False
    )
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-llama")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
