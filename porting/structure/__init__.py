"""structure compares how a model and its port are built: module trees, the mapping between them, what differs and why.

`meta` builds both without weights, `tree` describes one, `rendering` writes it, `counterparts` maps one to the other,
`differences` tells differences that a port has by nature from those that are bugs, `divergence` finds classes that
differ between the CPU and the device.
"""
