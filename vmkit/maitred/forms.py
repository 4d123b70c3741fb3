"""Our messages as JSON, for people and their programs. Pure.

The names are those of proto/vm_guest.proto. Text that is not UTF-8 has U+FFFD in its place when it is read.
"""

import difflib
from typing import Any

from vmkit.errors import ConfigError
from vshd.wire.proto3 import BOOL, BYTES, BYTES_LIST, BYTES_MAP, INT32, MESSAGE, SINT32, UINT32, UINT64, Field, Message

_LIMITS = {
    INT32: (-(1 << 31), (1 << 31) - 1),
    SINT32: (-(1 << 31), (1 << 31) - 1),
    UINT32: (0, (1 << 32) - 1),
    UINT64: (0, (1 << 64) - 1),
}


def parse_form(kind: type[Message], value: object, place: str = "the request") -> Message:
    """The message that a JSON object stands for. place: what it is, for errors. Raises ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f'{place} must be a JSON object such as {{"name": "value"}}, not {_describe(value)}')
    fields = {field.name: field for field in kind.FIELDS}
    message = kind()
    for name, item in value.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            known = ", ".join(fields) or "none"
            hint = f"did you mean '{close[0]}'?" if close else f"the fields are: {known}"
            raise ConfigError(f"{place} has no field '{name}'", hint=hint)
        setattr(message, name, _parse(fields[name], item, name))
    return message


def _parse(field: Field, value: object, place: str) -> object:
    if field.kind == BOOL:
        if not isinstance(value, bool):
            raise ConfigError(f"{place} must be true or false, not {_describe(value)}")
        return value
    if field.kind == BYTES:
        return _parse_text(value, place)
    if field.kind == BYTES_LIST:
        if not isinstance(value, list):
            raise ConfigError(f"{place} must be a list of texts, not {_describe(value)}")
        return [_parse_text(item, place) for item in value]
    if field.kind == BYTES_MAP:
        if not isinstance(value, dict):
            raise ConfigError(f"{place} must be an object of texts, not {_describe(value)}")
        return {_parse_text(key, place): _parse_text(item, place) for key, item in value.items()}
    if field.kind == MESSAGE:
        assert field.message is not None
        return parse_form(field.message, value, place)
    low, high = _LIMITS[field.kind]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{place} must be a whole number between {low} and {high}, not {_describe(value)}")
    return value


def _parse_text(value: object, place: str) -> bytes:
    if not isinstance(value, str):
        raise ConfigError(f"{place} must be text, not {_describe(value)}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place} has half of a character: {value!r}") from error


def render_form(message: Message) -> dict[str, Any]:
    """The message as a JSON object, with every field."""
    names: dict[str, tuple[str, ...]] = getattr(message, "NAMES", {})
    return {field.name: _render(getattr(message, field.name), names.get(field.name, ())) for field in message.FIELDS}


def _render(value: object, names: tuple[str, ...]) -> object:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [_render(item, ()) for item in value]
    if isinstance(value, dict):
        return {_render(key, ()): _render(item, ()) for key, item in value.items()}
    if isinstance(value, Message):
        return render_form(value)
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return value


def _describe(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), str(value))
