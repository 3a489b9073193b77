"""Dumps in the layouts of other tools, written here from their documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HIDDEN, VOCABULARY = 16, 64
TABLE = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
MODULES = ("embed_tokens", "layers.0.self_attn.o_proj", "layers.0.mlp", "norm", "lm_head")
PAD = 0


def hidden_states(module: str, tokens: Sequence[int], start: int = 0) -> torch.Tensor:
    """What a module computes for tokens from position `start` on: `[1, tokens, hidden]`; the embedding is a lookup."""
    rows = TABLE[torch.tensor(list(tokens))]
    if module == "embed_tokens":
        return rows[None]
    positions = torch.arange(start, start + len(tokens))[:, None]
    return (rows.float() * (2 + MODULES.index(module)) + positions).bfloat16()[None]


class HookDump:
    """The files of NxD Inference's capture hook: a step counter that never restarts, buckets padded on the right."""

    def __init__(self, folder: Path, *, bucket: int = 8, decode: str = "tkg", metadata: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.bucket, self.decode, self.metadata = folder, bucket, decode, metadata
        self.step = 0
        self.clock = 1000.0
        self.entries: dict[str, Any] = {}

    def generate(
        self, prompts: Sequence[Sequence[int]], fed: Sequence[Sequence[int]], modules: Sequence[str] = MODULES
    ) -> None:
        """One batch: prefill, then the tokens fed to the decode steps of every prompt (all of one number)."""
        self.step += 1
        for module in modules:
            padded = [[*prompt, *[PAD] * (self.bucket - len(prompt))] for prompt in prompts]
            values = torch.cat([hidden_states(module, row) for row in padded])
            if module == "lm_head":
                values = torch.stack([row[len(p) - 1 : len(p)] for row, p in zip(values, prompts, strict=True)])
            self.save(module, values)
        for index in range(len(fed[0])):
            self.step += 1
            for module in modules:
                rows = [
                    hidden_states(module, tokens[index : index + 1], len(prompt) + index)
                    for prompt, tokens in zip(prompts, fed, strict=True)
                ]
                self.save(module, torch.cat(rows))

    def save(self, module: str, values: torch.Tensor, port: str = "output", suffix: str = "") -> Path:
        """One tensor of the current step."""
        label = "cte" if self.step == 1 else self.decode
        name = f"captured_tensors_{label}_step_{self.step}_module_{module}_{port}{suffix}.pt"
        return self.write(name, values, label)

    def write(self, name: str, values: torch.Tensor, label: str = "cte") -> Path:
        """One file with its metadata."""
        torch.save(values.clone(), self.folder / name)
        self.clock += 1
        self.entries[name] = {
            "step": self.step,
            "phase": label,
            "tensor_shape": list(values.shape),
            "tensor_dtype": str(values.dtype),
            "timestamp": self.clock,
        }
        if self.metadata:
            body = {"capture_session": {"created_at": 0.0, "version": "1.0"}, "tensors": self.entries}
            (self.folder / "capture_metadata.json").write_text(json.dumps(body))
        return self.folder / name


def write_tokens(path: Path, prompts: Sequence[dict[str, Any]]) -> Path:
    """A tokens file."""
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def write_forward(
    folder: Path,
    name: str,
    tensors: dict[str, dict[int, torch.Tensor]],
    *,
    requests: Sequence[str],
    positions: Sequence[int],
    replica: int = 0,
) -> Path:
    """One forward pass of vLLM-Neuron's ModelCapture: tensors by module and rank, and its metadata."""
    place = folder / f"dp{replica}" / name
    for module, by_rank in tensors.items():
        (place / module).mkdir(parents=True, exist_ok=True)
        for rank, values in by_rank.items():
            torch.save(values.clone(), place / module / f"rank{rank}.pt")
    meta = {"req_ids": list(requests), "positions": list(positions), "dp_rank": replica}
    (place / f"{name}_meta.json").write_text(json.dumps(meta))
    return place
