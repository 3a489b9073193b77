"""A spec as JSON: written, read back, and its schema."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from ...store.errors import InputError
from .architecture import VERSION, Architecture, Number
from .encoder_decoder_facts import AnyArchitecture, EncoderDecoder

_JSON_TYPES: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
}


def to_json(spec: AnyArchitecture) -> str:
    """The spec as JSON; equal specs give equal text."""
    return json.dumps(dataclasses.asdict(spec), indent=2) + "\n"


def from_json(text: str) -> AnyArchitecture:
    """Read a spec back.

    Raises:
        InputError: the text is none, or of another version.
    """
    try:
        document = json.loads(text)
        found = document.get("version")
        if found != VERSION:
            raise InputError(
                f"the architecture has version {found}, this tensorsleuth reads {VERSION}: analyze it again"
            )
        kind = EncoderDecoder if "decoder" in document else Architecture
        return typing.cast(AnyArchitecture, _read(kind, document))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"this is no architecture: {type(error).__name__}: {error}; write one with port analyze"
        ) from error


def _read(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if value is None:
            return None
        return _read(next(k for k in typing.get_args(kind) if k is not type(None)), value)
    if typing.get_origin(kind) is tuple:
        return tuple(_read(typing.get_args(kind)[0], item) for item in value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
        return kind(**{name: _read(hints[name], item) for name, item in value.items()})
    return value


def json_schema() -> dict[str, Any]:
    """The JSON schema of the document (draft 2020-12)."""
    definitions: dict[str, Any] = {}
    root = _schema(AnyArchitecture, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind in _JSON_TYPES:
        return _JSON_TYPES[kind]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return {"anyOf": [_schema(k, definitions) for k in typing.get_args(kind)]}
    if typing.get_origin(kind) is tuple:
        return {"type": "array", "items": _schema(typing.get_args(kind)[0], definitions)}
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        definitions[kind.__name__] = {
            "type": "object",
            "description": (kind.__doc__ or "").strip().splitlines()[0],
            "properties": {field.name: _schema(hints[field.name], definitions) for field in fields},
            "required": [field.name for field in fields],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def numbers_in(value: Any) -> Iterator[str]:
    """Every expression and condition of a spec."""
    if isinstance(value, Number):
        yield value.expression
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.name in ("condition", "activation", "scaling"):
                yield item
            else:
                yield from numbers_in(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from numbers_in(item)


def without_cases(field: str) -> str:
    """A field's path without the numbers of cases: what `Sources` calls it."""
    path = ".".join(part for part in field.split(".") if not part.isdigit() and part != "block")
    return path.replace(".rotary.rotary", ".rotary")


def origin_of(spec: AnyArchitecture, field: str) -> str:
    """Where a field comes from: its own source, else that of the part it belongs to; empty when nothing is noted.

    Args:
        spec: the architecture.
        field: dotted path, as `leaves` gives it.
    """
    origins = {source.field: source.origin for source in spec.sources}
    path = without_cases(field)
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return origins.get(path, "")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """Every field of a spec by its dotted path; sources and the version are left out, None is no value."""
    if isinstance(value, Number):
        yield path, value.expression if "config" not in value.expression else f"{value.expression} = {value.value:g}"
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if path or field.name not in ("sources", "version", "ignored"):
                yield from leaves(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
        for index, item in enumerate(value):
            name = getattr(item, "name", "") or str(index)
            yield from leaves(item, f"{path}.{name}")
    elif value is not None and value != ():
        yield path, value
