"""The SQL standard library: one file per view or macro, with an enforced header; see `analyze.sql_library`."""
