"""The gated feed-forward block (Shazeer 2020, arXiv:2002.05202): what enters its down projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from ..sites import Site
from .activations import ACTIVATIONS, expected_first
from .inputs import InputVariant
from .runs import FloatArray
from .scene import Scene, View

_DOWN = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3"), "c_proj": ("w1", "w2")}


@dataclass(frozen=True)
class Gated:
    """act(gate) up."""

    gate: Site
    up: Site
    activation: str

    @property
    def name(self) -> str:
        """How it is written."""
        return f"{self.activation}({self.gate.name}) * {self.up.name}"

    def rows(self, view: View) -> FloatArray | None:
        """Its values on the scene's tokens."""
        gate, up = view.rows(self.gate), view.rows(self.up)
        return None if gate is None or up is None else ACTIVATIONS[self.activation](gate) * up

    def variants(self, view: View) -> Iterator[InputVariant]:
        """Ways to combine gate and up wrongly."""
        gate, up = view.rows(self.gate), view.rows(self.up)
        if gate is None or up is None:
            return
        act = ACTIVATIONS[self.activation]
        yield InputVariant(
            "gate_up_swapped",
            act(up) * gate,
            "gate and up projection have changed places",
            "the gate goes through the activation: check which half of a fused gate_up_proj it is",
        )
        yield InputVariant(
            "gate_missing", act(gate), "the product with the up projection is missing", "multiply by the up projection"
        )
        yield InputVariant(
            "gate_missing", act(up), "the activation is applied to the up projection alone", "multiply by the gate"
        )
        for name, other in ACTIVATIONS.items():
            if name != self.activation:
                yield InputVariant(
                    "wrong_activation",
                    other(gate) * up,
                    f"{name} is computed instead of {self.activation}",
                    f"use {self.activation} (hidden_act of the config)",
                    {"activation": name, "expected": self.activation},
                )
        for limit in (7.0, 10.0):
            low, high = np.minimum(gate, limit), np.clip(up, -limit, limit)
            yield InputVariant(
                "wrong_activation",
                low * expit(1.702 * low) * (high + 1),
                f"GPT-OSS's clamped activation (limit {limit:g}) is computed instead of {self.activation}",
                f"use {self.activation} (hidden_act of the config)",
                {"activation": "swiglu_oai", "expected": self.activation},
            )


def gated_sources(scene: Scene) -> Iterator[Gated]:
    """act(gate) up for a down projection, the config's activation first."""
    parent, _, leaf = scene.site.module.rpartition(".")
    if leaf not in _DOWN:
        return
    gate, up = (Site(f"{parent}.{name}") for name in _DOWN[leaf])
    if gate.name in scene.runs.sites and up.name in scene.runs.sites:
        for activation in expected_first(scene):
            yield Gated(gate, up, activation)
