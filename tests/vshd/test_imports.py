"""What the guest pays for: vshd imports nothing of ours but itself, of the standard library only what is listed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import Vshd

CHECKOUT = Path(__file__).resolve().parents[2]
VSHD = CHECKOUT / "vshd"
VSH = CHECKOUT / "vsh"

# All of them are in Debian's python3-minimal; `resource` alone is not, and is needed for two optional flags only.
ALLOWED = {"_signal", "_socket", "errno", "fcntl", "gc", "os", "select", "stat", "struct", "sys", "time"}
# Before Python 3.12, setns(2) is ctypes's.
LAZY = {"ctypes", "resource"}
# The one calculation the protocol has, and only where there is a token: from modules that the interpreter has built in.
OF_THE_PROOF = {"_operator", "_sha2", "_sha256", "hashlib"}
FOR_TYPES_ONLY = {"collections.abc", "typing"}

# Modules in memory once vshd listens, on the leanest Python; a heavy import would show here before it shows in a guest.
START_BUDGET = 72
# trixie's Python starts at about 9 MiB.
RESIDENT_BUDGET_KIB = 14 * 1024


def imports_of(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """(module, whether it is imported at start, whether for types only) of a source file."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{path}: a relative import"
            names = [node.module]
        for name in names:
            yield name, id(node) in top, id(node) in guarded


@pytest.mark.parametrize("path", sorted(VSHD.rglob("*.py")), ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_vshd_imports_only_what_is_allowed(path: Path) -> None:
    is_wire = "wire" in path.parts
    for name, is_top, is_for_types in imports_of(path):
        if is_for_types:
            assert name in FOR_TYPES_ONLY | ALLOWED or name.startswith("vshd.wire" if is_wire else "vshd.")
        elif name.split(".")[0] == "vshd":
            assert not is_wire or name.startswith("vshd.wire"), f"{name}: the protocol knows nothing of the daemon"
        elif is_wire and path.name == "proof.py":
            assert name in OF_THE_PROOF
        elif is_wire:
            raise AssertionError(f"{name}: the protocol needs no library")
        else:
            assert name in (ALLOWED if is_top else ALLOWED | LAZY)


@pytest.mark.parametrize("path", sorted(VSH.rglob("*.py")), ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_vsh_imports_of_ours_only_the_protocol(path: Path) -> None:
    for name, _, _ in imports_of(path):
        first = name.split(".")[0]
        assert first != "vmkit", f"{name}: the arrow points from vmkit to vsh"
        if first == "vshd":
            assert name.startswith(("vshd.wire", "vshd.carry"))
        elif first != "vsh":
            assert first in sys.stdlib_module_names, f"{name}: vsh needs no other package"


def run_lean(script: str) -> list[str]:
    """What a script prints in a Python started as guests start it."""
    argv = [sys.executable, "-I", "-S", "-B", "-c", f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{script}"]
    return subprocess.run(argv, capture_output=True, check=True, text=True).stdout.split()


def test_start_budget_of_the_daemon() -> None:
    loaded = run_lean("import vshd.pid1.init; print(*sys.modules)")
    ours = {name for name in loaded if name.startswith("vshd")}
    library = set(loaded) - ours - set(run_lean("print(*sys.modules)"))
    assert len(loaded) <= START_BUDGET, sorted(loaded)
    known = ALLOWED | {
        "_collections_abc",
        "_stat",
        "_struct",
        "genericpath",
        "os.path",
        "posixpath",
        "stat",
        "_abc",
        "abc",
    }
    assert library <= known, sorted(library - known)


def test_start_budget_of_the_proof() -> None:
    """hmac, hashlib and OpenSSL behind them would be a third of a short command's start."""
    loaded = run_lean("before = set(sys.modules); import vshd.wire.proof; print(*set(sys.modules) - before)")
    assert set(loaded) <= {"_operator", "_sha2", "_sha256", "vshd", "vshd.wire", "vshd.wire.errors", "vshd.wire.proof"}


def test_start_budget_of_a_short_command() -> None:
    """Neither these nor what they bring along is needed to run a command: each would cost milliseconds."""
    loaded = set(run_lean("import vsh.__main__, vsh.cli; print(*sys.modules)"))
    heavy = {"argparse", "asyncio", "collections", "dataclasses", "enum", "functools", "json", "logging", "pathlib"}
    heavy |= {"re", "selectors", "signal", "socket", "subprocess", "threading", "tomllib", "typing"}
    assert not loaded & heavy


def test_resident_memory_of_the_idle_daemon(vshd: Vshd) -> None:
    text = Path(f"/proc/{vshd.pid}/status").read_text()
    assert int(text.partition("VmRSS:")[2].split()[0]) <= RESIDENT_BUDGET_KIB


@pytest.mark.parametrize("package", ["vshd", "vsh"])
def test_one_module_opens_af_vsock(package: str) -> None:
    places = [path.name for path in (CHECKOUT / package).rglob("*.py") if "socket(_socket.AF_VSOCK" in path.read_text()]
    assert places == ["vsock.py" if package == "vshd" else "transport.py"]
