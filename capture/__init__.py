"""capture makes tensors: forward hooks on every module of a model, written while it runs.

`record` wraps any module tree; `capture_hugging_face` runs a causal language model over prompts, greedy or
teacher-forced, and records prefill and decode; `plan_capture` predicts both without running them. Needs torch, and
transformers for Hugging Face models: `pip install 'tensorsleuth[capture]'`.
"""

from .recorder import Recorder, record
from .selection import Selection

__all__ = ["Recorder", "Selection", "record"]
