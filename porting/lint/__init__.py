"""lint checks a port's source against a release of NxD Inference, without running it and without the SDK.

`api` knows the names and signatures of each release (`extract` makes that table from source checkouts), `source`
reads port files, the `rule_*` modules each judge one subject, `linter` puts them together. `coverage` runs a port's
checkpoint conversion on shapes alone.
"""
