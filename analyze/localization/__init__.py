"""localization says where an error comes from: change points in dataflow order, and injected against inherited error."""
