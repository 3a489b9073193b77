"""cli is the command `sleuth`: one thin module per command group over the packages that do the work.

Only typer and rich are imported to show the help; torch, transformers and matplotlib load when a command needs them.
Exit codes: 0 pass or done, 1 a verdict failed, 2 bad usage or input, 3 undecided.
"""
