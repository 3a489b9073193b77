"""localization says where an error comes from: change points in dataflow order, injected against inherited error.

`suspects` ranks the sites that may inject error; `localize` does that and keeps the result in the catalog;
`change_points` finds steps, spikes and drifts of R. Only the stored trace is read.
"""
