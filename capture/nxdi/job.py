"""What every rank of a capture is told: one JSON file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..generate import Generation
from ..prompts import EncodedPrompt
from ..selection import Selection


@dataclass(frozen=True)
class RankJob:
    """Everything a rank needs to build its part of a port, run it and record it.

    Attributes:
        model: folder of the checkpoint.
        port: the port's class as FILE:CLASS.
        config: its configuration class, empty for the one the port names.
        rendezvous: file through which ranks find each other.
        run_folder: where shards go.
        run: name of the run.
        dtype: the model's dtype by name.
        tp: tensor-parallel degree.
        length: length of the prefill bucket and of the cache.
        prompts: what it runs on.
        generation: how prompts are continued.
        selection: which sites are kept.
        statistics_only: keep no values.
        scores: record attention scores and weights.
        library_capture: record through NxD Inference's own tensor capture, as on a device.
        options: further arguments of the port's NeuronConfig.
    """

    model: str
    port: str
    config: str
    rendezvous: str
    run_folder: str
    run: str
    dtype: str
    tp: int
    length: int
    prompts: tuple[EncodedPrompt, ...]
    generation: Generation
    selection: Selection
    statistics_only: bool = False
    scores: bool = False
    library_capture: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        body = dataclasses.asdict(self)
        selection, generation = body["selection"], body["generation"]
        positions = self.selection.positions
        selection["positions"] = None if positions is None else [positions.start, positions.stop]
        selection["layers"] = None if self.selection.layers is None else sorted(self.selection.layers)
        generation["stop_tokens"] = sorted(self.generation.stop_tokens)
        path.write_text(json.dumps(body), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RankJob:
        """Read a job that `write` wrote."""
        body = json.loads(path.read_text(encoding="utf-8"))
        selection, generation = body["selection"], body["generation"]
        layers, positions = selection["layers"], selection["positions"]
        body["selection"] = Selection(
            include=tuple(selection["include"]),
            exclude=tuple(selection["exclude"]),
            layers=None if layers is None else frozenset(layers),
            positions=None if positions is None else range(*positions),
            inputs=selection["inputs"],
        )
        body["generation"] = Generation(**{**generation, "stop_tokens": frozenset(generation["stop_tokens"])})
        body["prompts"] = tuple(
            EncodedPrompt(
                prompt["id"],
                prompt["text"],
                tuple(prompt["token_ids"]),
                None if prompt["forced"] is None else tuple(prompt["forced"]),
                None if prompt["source_ids"] is None else tuple(prompt["source_ids"]),
            )
            for prompt in body["prompts"]
        )
        return cls(**body)
