"""plotting draws what a comparison measured: one module per picture, each split into its numbers and its drawing.

`source` reads the catalog, `figure` makes and saves figures, `scale` turns R into heights and colours; `layers`, `qq`
and `tokens` are the pictures. matplotlib loads with `figure`, so nothing else may import this package at start.
"""
