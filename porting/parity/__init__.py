"""parity proves a generated port: the real NxD Inference on a CPU against transformers, module by module.

`gate` writes a hostile checkpoint, captures the reference, the BF16 baseline and the port in every setting, and
compares them in a trace. `coverage` checks that every weight is consumed.
"""
