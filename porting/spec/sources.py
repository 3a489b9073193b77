"""Where every field of a spec comes from, collected while it is analysed."""

from __future__ import annotations

from .architecture import Number, Source


class Sources:
    """Origins by field."""

    def __init__(self) -> None:
        """Begin without any."""
        self._origins: dict[str, list[str]] = {}

    def add(self, field: str, *origins: str) -> None:
        """Note origins of a field; empty ones are left out."""
        known = self._origins.setdefault(field, [])
        known.extend(origin for origin in origins if origin and origin not in known)

    def measured(self, field: str, how: str, line: str = "") -> None:
        """Note that a field was measured, and the line of transformers that computes it."""
        self.add(field, f"measured: {how}", line)

    def number(self, field: str, number: Number, line: str = "") -> None:
        """Note the configuration key of a number."""
        named = "config" in number.expression
        origin = f"config: {number.expression.replace('config.', '')}" if named else "measured: constant of the class"
        self.add(field, origin, line)

    def entries(self) -> tuple[Source, ...]:
        """All of them, by field."""
        return tuple(Source(field, "; ".join(self._origins[field])) for field in sorted(self._origins))


class PartSources(Sources):
    """Origins of a part: its fields get a prefix, and go to the whole."""

    def __init__(self, whole: Sources, prefix: str, renamed: tuple[str, str] = ("", "")) -> None:
        """Write into other sources.

        Args:
            whole: the sources.
            prefix: what fields are inside of.
            renamed: the first word of a field, and what it is called there.
        """
        super().__init__()
        self._whole, self._prefix, self._renamed = whole, prefix, renamed

    def add(self, field: str, *origins: str) -> None:
        """Note origins of a field of the part."""
        words = [word for word in field.split(".") if not word.isdigit()]
        words[0] = self._renamed[1] if words[0] == self._renamed[0] else words[0]
        self._whole.add(".".join((self._prefix, *words)), *origins)
