"""The public face of the package: what `vmkit` lists, how it loads, and which kinds of errors it raises."""

import ast
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmkit
from vmkit.errors import ConfigError, VmkitError
from vsh.errors import VshError

PACKAGE = Path(vmkit.__file__)


@pytest.mark.parametrize("name", vmkit.__all__)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(vmkit, name)
    assert name in dir(vmkit)
    assert name in (vmkit.__doc__ or "") or (isinstance(value, type) and issubclass(value, Exception | vmkit.Check))
    if callable(value):
        assert (pydoc.getdoc(value) or "").strip()


def test_public_names_are_the_same_for_people_and_type_checkers() -> None:
    tree = ast.parse(PACKAGE.read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == set(vmkit.__all__) == set(vmkit._PUBLIC)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vmkit.nonsense  # noqa: B018


def test_package_loads_nothing_until_it_is_asked() -> None:
    """The monitor and the device import the package, and stay small."""
    script = "import sys; before = set(sys.modules); import vmkit; dir(vmkit); print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"vmkit"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "foo"}, "accelerator must be one of auto, kvm, tcg, not 'foo'"),
        ({"backend": "foo"}, "backend must be one of auto, vhost, user, not 'foo'"),
        ({"memory": "much"}, "'much' is not an amount of memory"),
        ({"name": "../x"}, "cannot be a machine's name"),
    ],
)
def test_wrong_option_raises_a_kind_of_ours(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vmkit.Machine("tiny", **options)


def test_kinds_of_errors_share_one_root() -> None:
    kinds = [value for name in vmkit.__all__ if isinstance(value := getattr(vmkit, name), type)]
    errors = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(errors) >= 10
    assert all(issubclass(kind, VshError) for kind in errors)
    assert issubclass(VmkitError, VshError)
