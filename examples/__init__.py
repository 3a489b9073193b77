"""Worked examples on a small trained model: the material of ``sleuth demo`` and of the fault benchmark.

``tiny-llama/`` is a byte-level Llama, trained by :mod:`.train_tiny_llama` on the prose that ships with Python.
:mod:`.stand_in` implements the same model a second time, with the module names of NxD Inference, and plays the
port under test. :mod:`.faults` lists the bugs that it can be given, each with the site where it must be found.
"""
