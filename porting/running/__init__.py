"""running compiles a port, lets it answer a prompt, and validates it against the model it was made from.

`DirectModelCompiler`, `run_inference_with_classes` and `validation.validate` are the whole interface. Each works on a
Neuron device and on a CPU, where the sources of NxD Inference run on a stand-in for the SDK. `compiler_flags` says what
reaches the compiler, `advice` what a tensor-parallel degree does to a model, `reduction` cuts layers off, `restored`
reads a compiled configuration back, `coherence` recognises output that is none, `matching` judges tokens.
"""

from .compiler import DirectModelCompiler
from .configuration import CompilationConfig
from .inference import run_inference_with_classes

__all__ = ["CompilationConfig", "DirectModelCompiler", "run_inference_with_classes"]
