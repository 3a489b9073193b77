"""calibration says how much a clean port may differ: null distributions, q-values and thresholds learnt from them."""
