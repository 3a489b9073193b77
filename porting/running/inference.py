"""Letting a port answer one prompt, and saying whether the answer is one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...store.errors import InputError
from .coherence import incoherence
from .configuration import class_reference
from .reduction import reduce_checkpoint
from .restored import SavedConfig, read_saved_config
from .sampling import Sampling
from .session import Answers, CpuPort, DevicePort, answer_on_cpu, length_for


def run_inference_with_classes(
    model_class: type,
    config_class: type,
    model_path: str | Path,
    compiled_path: str | Path | None = None,
    prompt: str | Sequence[int] = "",
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    cpu_mode: bool = False,
    num_layers: int | None = None,
    seq_len: int = 512,
    batch_size: int = 1,
    suppress_special_tokens: bool = True,
    enable_tensor_capture: bool = False,
    modules_to_capture: Sequence[str] | None = None,
    capture_indices: Sequence[int] | None = None,
    tensor_capture_output_dir: str | Path | None = None,
    *,
    tp_degree: int = 1,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> tuple[bool, str, dict[str, Any]]:
    """Answer a prompt with a port.

    Args:
        model_class: the port's causal model class.
        config_class: its inference configuration class.
        model_path: folder of the Hugging Face checkpoint and its tokenizer.
        compiled_path: folder that the port was compiled into. Its configuration is restored exactly, on a CPU too.
        prompt: text, or token ids where there is no tokenizer.
        max_new_tokens: tokens at most.
        temperature: 0 for greedy.
        top_p: sample from the smallest set of tokens of this probability.
        cpu_mode: run on this CPU; nothing needs to be compiled.
        num_layers: run the first layers only (CPU).
        seq_len: longest sequence (CPU, where no compiled configuration says it).
        batch_size: rows per forward pass (likewise).
        suppress_special_tokens: never choose special tokens, but for those that end the answer. How often one was the
            likeliest is among the metrics: suppressing hides what goes wrong.
        enable_tensor_capture: save the tensors that were compiled in (device).
        modules_to_capture: cannot be chosen here: they are compiled in.
        capture_indices: steps to save; all by default.
        tensor_capture_output_dir: where they are saved.
        tp_degree: ranks (CPU, likewise).
        dtype: dtype by name (CPU, likewise).
        seed: of sampling.

    Returns:
        Whether the answer is coherent, the answer (token ids where there is no tokenizer), and metrics:
        `inference_time`, `input_tokens`, `generated_tokens`, `tokens_per_second`, `tp_degree`, `ttft_seconds`,
        `load_seconds`, `tokens`, `stopped`, `suppressed`, `nonfinite_steps`, `incoherence`.

    Raises:
        InputError: an argument cannot be used; without a device, `cpu_mode` has to be set.
    """
    folder = Path(model_path)
    tokenizer, ids = _encode(folder, prompt)
    special = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset()
    stop = _stop_tokens(folder)
    sampling = Sampling(
        max_new_tokens, temperature, top_p, seed, stop, special - stop if suppress_special_tokens else frozenset()
    )
    saved = read_saved_config(Path(compiled_path)) if compiled_path is not None else None
    if cpu_mode:
        if enable_tensor_capture:
            raise InputError("on a CPU, tensors are captured by 'sleuth capture nxdi TRACE MODEL --cpu'")
        port = _cpu_port(
            folder, model_class, config_class, saved, [ids], sampling, seq_len, batch_size, tp_degree, dtype
        )
        found = _on_cpu(port, num_layers, [ids], sampling)
        tp = port.tp
    else:
        if compiled_path is None or saved is None:
            raise InputError("say what runs: compiled_path on a Neuron device, or cpu_mode=True")
        if num_layers is not None or modules_to_capture is not None:
            raise InputError("num_layers and modules_to_capture are compiled in; give them to the compilation")
        device = DevicePort(class_reference(model_class), Path(compiled_path))
        if enable_tensor_capture:
            device.save_captures(tensor_capture_output_dir, capture_indices)
        found = device.answer([ids], sampling)
        tp = saved.tp
    return _judged(found, ids, tokenizer, special | stop, tp)


def _judged(
    found: Answers, prompt: Sequence[int], tokenizer: Any, special: frozenset[int], tp: int
) -> tuple[bool, str, dict[str, Any]]:
    (answer,) = found.answers
    tokens = list(answer.tokens)
    text = tokenizer.decode(tokens, skip_special_tokens=True) if tokenizer is not None else None
    why = incoherence(tokens, special=special, text=text)
    if answer.n_nonfinite:
        why = f"logits hold NaN or infinity in {answer.n_nonfinite} steps"
    metrics = {
        "inference_time": answer.seconds,
        "input_tokens": len(prompt),
        "generated_tokens": len(tokens),
        "tokens_per_second": len(tokens) / answer.seconds,
        "tp_degree": tp,
        "ttft_seconds": answer.first_seconds,
        "load_seconds": found.load_seconds,
        "tokens": tokens,
        "stopped": answer.stopped,
        "suppressed": answer.n_suppressed,
        "nonfinite_steps": answer.n_nonfinite,
        "incoherence": why,
    }
    return not why, text if text is not None else " ".join(map(str, tokens)), metrics


def _on_cpu(port: CpuPort, num_layers: int | None, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Answers:
    if num_layers is None:
        return answer_on_cpu(port, prompts, sampling)
    with tempfile.TemporaryDirectory(prefix="sleuth-layers-") as scratch:
        reduced = reduce_checkpoint(port.model, num_layers, Path(scratch) / "model")
        return answer_on_cpu(CpuPort(**{**vars(port), "model": reduced}), prompts, sampling)


def _cpu_port(
    folder: Path,
    model_class: type,
    config_class: type,
    saved: SavedConfig | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seq_len: int,
    batch_size: int,
    tp_degree: int,
    dtype: str,
) -> CpuPort:
    """A port as it was compiled, or as the arguments say."""
    classes = class_reference(model_class), class_reference(config_class)
    if saved is not None:
        options = {**saved.options, "attn_kernel_enabled": False}
        return CpuPort(folder, *classes, saved.dtype, saved.tp, saved.batch, saved.seq_len, options)
    length = min(length_for(prompts, sampling.new_tokens), max(seq_len, 1))
    if length < max(map(len, prompts)) + sampling.new_tokens:
        raise InputError(f"prompt and answer do not fit seq_len {seq_len}; give a longer one")
    return CpuPort(folder, *classes, dtype, tp_degree, batch_size, length)


def _encode(folder: Path, prompt: str | Sequence[int]) -> tuple[Any, list[int]]:
    """The tokenizer, None if there is none, and the prompt's tokens."""
    from transformers import AutoTokenizer

    from ...capture.hf import ModelSource, load_tokenizer

    has_tokenizer = load_tokenizer(ModelSource(folder)) is not None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    if not isinstance(prompt, str):
        return tokenizer, list(prompt)
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer; give the prompt as token ids")
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise InputError("the prompt is empty; give a text of at least one token")
    return tokenizer, ids


def _stop_tokens(folder: Path) -> frozenset[int]:
    """End-of-sequence tokens: of the model, and of its generation configuration."""
    from ...capture.hf import ModelSource, load_config, stop_tokens

    found = set(stop_tokens(load_config(ModelSource(folder))))
    file = folder / "generation_config.json"
    if file.is_file():
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
