"""docs/reference/files.md and its schemas say the same, and the programs print what they say. No machine is needed."""

import json
import re

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator, ValidationError

from tests.docs.pages import CHECKOUT
from tests.docs.schemas import NAMES, check_form, read_schema
from vmkit.cli.main import vmkit

PAGE = (CHECKOUT / "docs/reference/files.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_one(name: str) -> None:
    Draft202012Validator.check_schema(read_schema(name))
    assert f"(schemas/{name}.schema.json)" in PAGE


@pytest.mark.parametrize("name", [name for name in NAMES if name != "machines"])
def test_table_has_every_key_of_the_schema(name: str) -> None:
    table = PAGE.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    schema = read_schema(name)
    properties = schema.get("items", schema)["properties"]
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", table, re.MULTILINE))
    assert rows == {key: value["description"] for key, value in properties.items()}


def test_list_of_machines_is_made_of_machines() -> None:
    machine = read_schema("machine")
    assert read_schema("machines")["items"]["properties"] == machine["properties"]
    assert read_schema("machines")["items"]["required"] == machine["required"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("doctor", ["doctor"]),
        ("images", ["images"]),
        ("machines", ["list"]),
        ("forwards", ["forward", "--list"]),
        ("shares", ["shares"]),
    ],
)
def test_program_prints_the_form(
    name: str, words: list[str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path_factory.mktemp("r")
    runtime.chmod(0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    result = CliRunner().invoke(vmkit, [*words, "--json"])
    check_form(name, json.loads(result.stdout))


def test_wrong_form_is_found() -> None:
    check = {"name": "kvm", "level": "fine", "text": "", "hint": ""}
    with pytest.raises(ValidationError, match="'fine' is not one of"):
        check_form("doctor", {"works": True, "checks": [check]})
    with pytest.raises(AssertionError, match="does not list"):
        check_form("doctor", {"works": True, "checks": [], "more": 1})
