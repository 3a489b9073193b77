"""calibration says how much a clean port may differ, and gives the verdicts of a comparison.

`judging` gathers the evidence of every site, `settling` turns it into q-values and verdicts. How clean runs scatter
comes from replicates (`replicates`, `null`), from known-good ports (`learn`), or else only from the tokens
(`exchange`). `routing` finds the tokens that a mixture of experts sends elsewhere. docs/calibration.md says why.
"""
