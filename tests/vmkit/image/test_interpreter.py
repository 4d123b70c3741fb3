"""The host's Python compiles for a guest of the very same release, and for no other."""

import importlib.util
import sys

import pytest

from vmkit.image.interpreter import find_host_interpreter, find_magic, find_release

OWN = ".".join(map(str, sys.version_info[:3]))
MAGIC = importlib.util.MAGIC_NUMBER


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("3.13.5-2+deb13u5", "3.13.5"),
        ("1:3.11.2-6", "3.11.2"),
        ("3.11.2+really", "3.11.2"),
        # Its bytecode may be another than the release's.
        ("3.14.0~rc2-1", ""),
        ("3.13-1", ""),
        ("", ""),
    ],
)
def test_release_is_in_the_version_of_the_package(version: str, release: str) -> None:
    assert find_release(version) == release


def test_magic_number_is_in_the_library_s_source() -> None:
    line = b"MAGIC_NUMBER = (3571).to_bytes(2, 'little') + b'\\r\\n'\n"
    assert find_magic(b"# 3571\n" + line + b"x") == b"\xf3\r\r\n"
    assert find_magic(b"from _imp import pyc_magic_number_token\n") == b""
    with open(importlib.util.__file__.replace("util.py", "_bootstrap_external.py"), "rb") as file:  # noqa: PTH123
        assert find_magic(file.read()) in (MAGIC, b"")


def test_host_s_interpreter_is_of_the_same_release_and_bytecode() -> None:
    found = find_host_interpreter(OWN, MAGIC)
    assert found is not None
    assert str(found.argv[0]) == sys.executable
    assert not found.is_guests
    major, minor, micro = sys.version_info[:3]
    assert find_host_interpreter(f"{major}.{minor}.{micro + 50}", MAGIC) is None
    assert find_host_interpreter(f"{major}.{minor + 50}.{micro}", MAGIC) is None
    assert find_host_interpreter(OWN, b"\0\0\r\n") is None
