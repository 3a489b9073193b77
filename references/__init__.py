"""references is the knowledge base: what goes wrong when a model is ported, how to see it, and what to do.

Entries are Markdown, one file per area, in a format that docs/knowledge.md describes; `entries` reads them, `search`
ranks them by words, `match_log` finds the ones whose log pattern occurs in a file. Nothing else is needed: no torch,
no trace.
"""

from .entries import Entry, entries, entry
from .logs import LogMatch, match_log
from .search import Hit, search

__all__ = ["Entry", "entries", "entry", "Hit", "search", "LogMatch", "match_log"]
