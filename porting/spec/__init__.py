"""spec says what an architecture is: typed facts, each with the place it comes from.

A small, hostile model of the configuration runs once (`hostile`, `observation`), and every value in it is explained:
how a layer is wired (`layers`, `wiring`), norms (`norms`), attention (`attention`, `rotary`), feed-forward blocks
(`feed_forward`), both ends (`ends`). Numbers are traced to configuration keys (`expressions`). `extract` puts the
description (`architecture` and the `*_facts` it is made of) together; what it cannot explain is an error. `document` is
its JSON.
"""
