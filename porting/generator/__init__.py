"""generator writes NxD Inference ports from specs.

`plan` decides what a port contains, `conversion` how weights become its own, `templates/` holds the text, one block
per file, and `generate` puts it together.
"""
