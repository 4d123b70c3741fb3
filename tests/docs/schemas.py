"""The forms of docs/reference/files.md: a JSON schema each, against which tests hold what the programs print."""

import json
from typing import Any

from jsonschema import Draft202012Validator

from tests.docs.pages import CHECKOUT

FOLDER = CHECKOUT / "docs/reference/schemas"
NAMES = sorted(path.name.removesuffix(".schema.json") for path in FOLDER.glob("*.schema.json"))


def read_schema(name: str) -> dict[str, Any]:
    """The schema of a form."""
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    assert isinstance(schema, dict)
    return schema


def check_form(name: str, value: object) -> None:
    """Raises ValidationError where the value has not the form; AssertionError for a key that the form does not list."""
    schema = read_schema(name)
    Draft202012Validator(schema).validate(value)
    form = schema.get("items", schema)
    for item in value if isinstance(value, list) else [value]:
        assert isinstance(item, dict)
        unknown = set(item) - set(form["properties"])
        assert not unknown or name == "event", f"{name}: docs/reference/files.md does not list {sorted(unknown)}"
