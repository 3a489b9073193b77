"""analyze judges tensors: aligns three runs, measures every site, gives verdicts and answers SQL.

`compare` does it all; `measure` is the numerical core; `sql_library` holds the views, macros and functions behind
`sleuth sql`. Nothing here imports torch: a stored trace is enough.
"""
