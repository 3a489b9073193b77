"""The file that says what is validated: the Autoport skill's, with a few keys more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...store.errors import InputError

_REQUIRED = ("model_class", "config_class", "model_path")
_KNOWN = frozenset(
    {
        *_REQUIRED,
        "model_name",
        "compiled_model_path",
        "tp_degree",
        "num_tokens_to_check",
        "test_parameters",
        "prompts",
        "dtype",
        "neuron_options",
        "expected_ttft_ms",
        "expected_tokens_per_second",
        "description",
    }
)
#: What is asked where the file names no prompts.
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "Once upon a time, in a small village,",
    "The three primary colors are",
    "In the year 1969, the first human",
    "To make bread, you need flour, water and",
    "The opposite of hot is",
    "A group of wolves is called a",
    "The largest planet in the solar system is",
)


@dataclass(frozen=True)
class ValidationConfig:
    """What is validated.

    Attributes:
        model_class: the port's causal model class as FILE:CLASS.
        config_class: its configuration class as FILE:CLASS.
        model_path: folder of the Hugging Face checkpoint.
        model_name: what results are called.
        compiled_model_path: folder that the port was compiled into; None to run on a CPU.
        tp_degree: ranks.
        num_tokens_to_check: tokens per prompt.
        test_parameters: batch size and longest sequence of every case.
        prompts: texts, or lists of token ids.
        dtype: dtype of the port on a CPU.
        neuron_options: further arguments of its NeuronConfig on a CPU.
        expected_ttft_ms: time to the first token that 1.1 times may be taken; None not to judge it.
        expected_tokens_per_second: throughput of which 0.9 times must be reached; None not to judge it.
    """

    model_class: str
    config_class: str
    model_path: Path
    model_name: str = "port"
    compiled_model_path: Path | None = None
    tp_degree: int = 1
    num_tokens_to_check: int = 64
    test_parameters: tuple[tuple[int, int], ...] = ((1, 0),)
    prompts: tuple[str | tuple[int, ...], ...] = ()
    dtype: str = "bfloat16"
    neuron_options: Mapping[str, Any] = field(default_factory=dict)
    expected_ttft_ms: float | None = None
    expected_tokens_per_second: float | None = None


def read_validation_config(path: Path) -> ValidationConfig:
    """Read a configuration file; paths in it are relative to the current folder, else to the file's.

    Raises:
        InputError: it cannot be read, lacks a key, or has one that is not known.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InputError(f"{path} holds no JSON object")
    missing = [name for name in _REQUIRED if name not in body]
    unknown = sorted(set(body) - _KNOWN)
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown keys: {', '.join(unknown)}"
        raise InputError(f"{path} {what}; it may hold {', '.join(sorted(_KNOWN))}")
    compiled = body.get("compiled_model_path")
    try:
        return ValidationConfig(
            model_class=_class(body["model_class"], path),
            config_class=_class(body["config_class"], path),
            model_path=_found(body["model_path"], path),
            model_name=str(body.get("model_name", "port")),
            compiled_model_path=None if compiled is None else _found(compiled, path),
            tp_degree=int(body.get("tp_degree", 1)),
            num_tokens_to_check=int(body.get("num_tokens_to_check", 64)),
            test_parameters=_cases(body.get("test_parameters")),
            prompts=tuple(one if isinstance(one, str) else tuple(map(int, one)) for one in body.get("prompts", ())),
            dtype=str(body.get("dtype", "bfloat16")),
            neuron_options=dict(body.get("neuron_options", {})),
            expected_ttft_ms=_number(body.get("expected_ttft_ms")),
            expected_tokens_per_second=_number(body.get("expected_tokens_per_second")),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path} holds a value that cannot be read: {error!r}") from error


def _cases(given: Any) -> tuple[tuple[int, int], ...]:
    if not given:
        return ((1, 0),)
    return tuple((int(case.get("batch_size", 1)), int(case.get("seq_len", 0))) for case in given)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _found(text: str, config: Path) -> Path:
    given = Path(text).expanduser()
    beside = config.parent / given
    return beside if not given.exists() and beside.exists() else given


def _class(text: str, config: Path) -> str:
    """FILE:CLASS with the file where it is; MODULE:CLASS as it is."""
    place, separator, name = text.rpartition(":")
    return f"{_found(place, config)}:{name}" if separator and place.endswith(".py") else text
