"""Every listener of the host that a guest connects to stands in docs/explanation/security.md, with its proof."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.vsh.live import CHECKOUT

DOCUMENT = CHECKOUT / "docs/explanation/security.md"
# Whoever calls one of these makes a port of the host that a guest can connect to.
OPENERS = {"listen_for_guest", "listen_vsock"}
# It makes the sockets of a machine's own ports by their names, as the device expects them.
BY_NAME = {"vmkit/monitor/hosting.py"}
# Where they are defined.
OF_ALL = {"vsh/listener.py", "vsh/transport.py"}


def read_rows() -> list[list[str]]:
    table = DOCUMENT.read_text().partition("<!-- the host's listeners -->")[2].partition("<!-- the end")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    return rows[2:]


def find_openers() -> Iterator[str]:
    for package in ("vsh", "vmkit"):
        for path in (CHECKOUT / package).rglob("*.py"):
            calls = {
                node.func.id
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            if calls & OPENERS:
                yield str(path.relative_to(CHECKOUT))


def find_tests() -> set[str]:
    texts = [path.read_text() for path in Path(CHECKOUT / "tests").rglob("test_*.py")]
    return {name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}


def test_document_has_every_listener_that_a_guest_connects_to() -> None:
    documented = {re.findall(r"`([^`]+)`", row[1])[0] for row in read_rows()}
    assert documented == (set(find_openers()) | BY_NAME) - OF_ALL


def test_every_listener_has_a_proof_that_a_test_holds() -> None:
    rows, tests = read_rows(), find_tests()
    assert len(rows) >= 4
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row[4])
        assert named, row
        assert set(named) <= tests, row
        assert row[2], row
