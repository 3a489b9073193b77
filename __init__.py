"""tensorsleuth: capture a model's tensors once, then find where its port diverges, and why."""

__version__ = "0.1.0"
