"""The rooms and the arrows between them, docs/explanation/architecture.md as a test.

vshd's own budget is in tests/vshd.
"""

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from vmkit.machine.parts.table import PARTS

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("vmkit", "vsh", "vshd")
SHIPPED = sorted(path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py"))
FILES = frozenset(SHIPPED)
IDS = [str(path.relative_to(CHECKOUT)) for path in SHIPPED]

# What each part of ours may import of ours; the longest name that fits is a part's own. `a.*` is everything below a,
# `vmkit` and `vshd` alone stand for where their files are.
ARROWS = {
    "vshd.wire": ("vshd.wire.*",),
    "vshd.carry": ("vshd.carry.*", "vshd.wire.*"),
    "vshd": ("vshd.*",),
    "vsh": ("vsh.*", "vsh", "vshd.wire.*", "vshd.wire", "vshd.carry.*", "vshd.carry"),
    # By hand it binds its own sockets, with the care that all of ours take.
    "vmkit.vsock": ("vmkit.vsock.*", "vshd.carry.inherited", "vshd.carry.sockets"),
    # What the device and its users both know is pure.
    "vmkit.packets": (
        *("vmkit.packets.*", "vmkit.errors"),
        *("vmkit.vsock.packet", "vmkit.vsock.records", "vmkit.vsock.requests"),
    ),
    "vmkit.errors": ("vsh.errors",),
    # A table that every room may know.
    "vmkit.architectures": ("vmkit.errors",),
    "vmkit.run": ("vmkit.errors",),
    "vmkit.state": ("vmkit.errors",),
    # Reports are text of anybody's.
    "vmkit.junit": (),
    "vmkit.ktap": ("vmkit.ktap.*", "vmkit.junit", "vsh.text"),
    "vmkit.entries": ("vmkit.entries.*", "vmkit.errors", "vsh.registry"),
    "vmkit.stored": ("vmkit.stored.*", "vmkit.entries.*", "vmkit.errors", "vmkit.state", "vsh.registry"),
    # What outlives machines, in the user's data folder.
    "vmkit.crashes": (
        *("vmkit.crashes.*", "vmkit.entries.entry", "vmkit.stored.place", "vmkit.errors", "vmkit.state"),
        # A core's symbols are in its image.
        *("vmkit.image.cache", "vmkit.image.formats.*", "vmkit.run"),
        "vsh.registry",
    ),
    "vmkit.snapshots": ("vmkit.snapshots.*", "vmkit.errors", "vshd.wire.version"),
    "vmkit.image": (
        *("vmkit.image.*", "vmkit.architectures", "vmkit.errors", "vmkit.run", "vmkit.state"),
        *("vsh.errors", "vmkit", "vshd"),
    ),
    # What a user brings becomes a disk in the cache; no machine is known here.
    "vmkit.roots": (
        *("vmkit.roots.*", "vmkit.image.formats.*", "vmkit.image.artifacts", "vmkit.image.cache"),
        *("vmkit.docker.engine",),
        *("vmkit.architectures", "vmkit.errors", "vmkit.run"),
    ),
    # A kernel that its user built; no machine is known here.
    "vmkit.trees": (
        *("vmkit.trees.*", "vmkit.image.formats.*", "vmkit.image.cache", "vmkit.image.modules"),
        "vmkit.errors",
    ),
    # What a guest has in its memory is read without I/O but for one file.
    "vmkit.memory": ("vmkit.memory.*", "vmkit.errors"),
    "vmkit.machine": (
        *("vmkit.machine.*", "vmkit.entries.*", "vmkit.image.*", "vmkit.errors", "vmkit.run", "vmkit.state"),
        *("vmkit.architectures", "vmkit.memory.lines", "vmkit.roots.*", "vmkit.trees.*"),
        *("vmkit.snapshots.*", "vmkit.stored.*", "vmkit.copy.*", "vmkit.crashes.*"),
        # What the API of a machine loads when it is called.
        *("vmkit.shares.place", "vmkit.shares.registry", "vmkit.shares.start", "vmkit.maitred.client"),
        *("vsh.*", "vmkit"),
    ),
    # It becomes virtiofsd.
    "vmkit.machine.host_view": ("vshd.carry.inherited",),
    "vmkit.monitor": (
        *("vmkit.monitor.*", "vmkit.machine.*", "vmkit.memory.*", "vmkit.entries.*", "vmkit.snapshots.*"),
        *("vmkit.crashes.*", "vmkit.architectures", "vmkit.errors", "vmkit.run", "vmkit.cros.notes"),
        *("vsh.*", "vshd.carry.*", "vshd.wire.cores", "vshd.wire.errors", "vshd.wire.units"),
    ),
    # It gets its connections from its callers.
    "vmkit.copy": ("vmkit.copy.*", "vmkit.errors", "vsh.text"),
    "vmkit.pool": (
        *("vmkit.pool.*", "vmkit.machine.*", "vmkit.entries.*", "vmkit.errors"),
        *("vsh.*", "vshd.carry.inherited"),
    ),
    "vmkit.builder": (
        *("vmkit.builder.*", "vmkit.machine.*", "vmkit.entries.*", "vmkit.snapshots.*", "vmkit.errors"),
        *("vmkit.image.build", "vmkit.image.cache", "vsh.errors", "vsh.registry", "vshd.carry.inherited"),
    ),
    # The guest's requests are answered from one folder; a machine is known by its name.
    "vmkit.shares": (
        *("vmkit.shares.*", "vmkit.machine.programs", "vmkit.entries.*", "vmkit.errors"),
        # A share by virtiofs is a device of vhost-user, and the machine's monitor plugs it.
        *("vmkit.machine.stop", "vmkit.machine.virtiofsd", "vmkit.machine.words"),
        *("vmkit.vsock.memory", "vmkit.vsock.syscalls", "vmkit.vsock.vhost_user", "vmkit.vsock.vring"),
        *("vsh.*", "vshd.wire.*", "vshd.carry.inherited"),
    ),
    "vmkit.ninep": ("vmkit.ninep.*", "vmkit.shares.*"),
    # What a container runs is planned without a machine.
    "vmkit.containers": (
        *("vmkit.containers.*", "vmkit.machine.running", "vmkit.roots.*", "vmkit.errors"),
        *("vsh.*", "vshd.wire.*"),
    ),
    "vmkit.containers.plan": ("vmkit.roots.settings", "vmkit.errors"),
    # A test's forwards end with its machine.
    "vmkit.testing": (
        *("vmkit.testing.*", "vmkit.pool.*", "vmkit.machine.*", "vmkit.forward.*", "vmkit.packets.*"),
        *("vmkit.errors", "vsh.*"),
    ),
    "vmkit.matrix": (
        *("vmkit.matrix.*", "vmkit.ktap.*", "vmkit.machine.*", "vmkit.architectures", "vmkit.junit", "vmkit.errors"),
        # How a root is named. It is pure.
        *("vmkit.roots.source", "vsh.*", "vshd.wire.version"),
    ),
    "vmkit.oneshot": (
        "vmkit.oneshot.*",
        "vmkit.machine.*",
        "vmkit.roots.settings",
        "vmkit.errors",
        "vsh.*",
        "vshd.wire.*",
    ),
    "vmkit.bisect": ("vmkit.ktap.*", "vmkit.machine.*", "vmkit.junit", "vsh.*"),
    # A container's devices are what doctor found, its terminal is vsh's.
    # Its half for guests is packed into images, and so imports nothing of the rest of vmkit.
    "vmkit.maitred": ("vmkit.maitred.*", "vmkit.errors", "vsh.*", "vshd.wire.*"),
    "vmkit.maitred.messages": ("vshd.wire.proto3",),
    "vmkit.maitred.codec": ("vshd.wire.*",),
    "vmkit.maitred.joined": (),
    "vmkit.maitred.guest": (
        *("vmkit.maitred.guest.*", "vmkit.maitred.messages", "vmkit.maitred.codec", "vmkit.maitred.joined"),
        "vshd.*",
    ),
    # What a guest sends is read in a process of its own, which knows no machine.
    "vmkit.cros": ("vmkit.cros.*", "vmkit.maitred.messages", "vmkit.maitred.codec", "vshd.wire.*", "vshd.carry.*"),
    "vmkit.docker": ("vmkit.docker.*", "vmkit.machine.doctor", "vmkit.errors", "vsh.*", "vshd.carry.*"),
    "vmkit.bench": ("vmkit.*", "vsh.*", "vshd.wire.*", "vshd.wire", "vshd.carry.*"),
    "vmkit": ("vmkit.*", "vsh.*", "vshd.wire.*", "vshd.carry.*"),
}
# Each third-party package has one place where it is known.
THIRD_PARTY = {
    "click": ("vmkit.cli",),
    "rich": ("vmkit.cli.show",),
    "qemu": ("vmkit.monitor.qmp",),
    "pathspec": ("vmkit.copy.excludes",),
    "jinja2": ("vmkit.image.recipe.sandbox",),
    # The engine's failures are explained in one place; requests is what the SDK speaks HTTP with.
    "matplotlib": ("vmkit.bench.report",),
    "paramiko": ("vmkit.bench.guest",),
    "pytest": ("vmkit.testing.plugin",),
    "grpclib": ("vmkit.maitred", "vmkit.cros"),
    "docker": ("vmkit.docker.engine", "vmkit.docker.context", "vmkit.docker.build", "vmkit.docker.container"),
    "requests": ("vmkit.docker.engine",),
    "urllib3": ("vmkit.docker.engine",),
}
# run.py is the door; the others start what lives long, and own its life.
STARTS_PROGRAMS = {
    "vmkit/run.py",
    "vmkit/forward/namespace.py",
    "vmkit/ssh/access.py",
    # It becomes the device.
    "vmkit/cli/device.py",
    # It becomes vsh.
    "vmkit/cli/container.py",
    "vmkit/bench/programs.py",
    # In the guest.
    "vmkit/maitred/guest/launching.py",
    "vmkit/maitred/guest/system.py",
    "vmkit/maitred/guest/waiting.py",
    "vmkit/docker/__main__.py",
    "vmkit/monitor/child.py",
    "vmkit/machine/programs.py",
    "vmkit/machine/probe.py",
    # virtiofsd, under its filter.
    "vmkit/shares/guard.py",
    # It becomes virtiofsd.
    "vmkit/machine/host_view.py",
}
# One module of the standard library, by its names before and since Python 3.12.
LIBRARY = sys.stdlib_module_names | {"_sha2", "_sha256"}
OPENS_AF_VSOCK = {"vsh/transport.py", "vshd/carry/vsock.py"}
# These tell a socket's family when they see one.
KNOWS_AF_VSOCK = OPENS_AF_VSOCK | {"vshd/listener.py", "vshd/carry/endpoints.py", "vsh/listener.py"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# One idea in two programs, so one name: a program's options, the two ends of a session, the limit of a flood of lines
# (on a terminal, in the kernel's log), and signals for poll(). vsh takes only vshd.wire and vshd.carry from vshd.
TWINS = {"Options", "Session", "Throttle", "Wakeup"}
LINES_OF_A_FILE = 450
LINES_OF_A_FUNCTION = 60
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "shared"}


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def walk(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parse(path)))


def module_name(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every imported module, wherever in the file; `from a import b` counts as a.b where that is a module of ours."""
    for node in walk(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = CHECKOUT / node.module.replace(".", "/") / alias.name
                yield f"{node.module}.{alias.name}" if inner.with_suffix(".py") in FILES else node.module


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@cache
def arrows_of(module: str) -> tuple[str, ...]:
    return ARROWS[max((prefix for prefix in ARROWS if is_within(module, (prefix,))), key=len)]


def may_import(module: str, name: str) -> bool:
    first = name.split(".", maxsplit=1)[0]
    if first in PACKAGES:
        return any(fnmatch(name, arrow) or f"{name}.*" == arrow for arrow in arrows_of(module))
    return first in LIBRARY or is_within(module, THIRD_PARTY.get(first, ()))


# One test for all files, here and below, and its failure names them all: a test for each file took a third of the time
# of `make quick`.
def test_imports_follow_the_arrows() -> None:
    modules = [(module_name(path), path) for path in SHIPPED]
    assert not [
        f"{module} imports {name}"
        for module, path in modules
        for name in imports_of(path)
        if not may_import(module, name)
    ]


def test_nobody_below_knows_the_command_line() -> None:
    for path in SHIPPED:
        if not is_within(module_name(path), ("vmkit.cli", "vmkit.__main__")):
            assert not any(is_within(name, ("vmkit.cli", "vmkit.__main__")) for name in imports_of(path)), path


def find_texts(path: Path) -> set[str]:
    """The strings of a module, without its docstrings."""
    nodes = list(walk(path))
    documents = {ast.get_docstring(node, clean=False) for node in nodes if isinstance(node, DOCUMENTED)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts - documents


def test_monitor_names_no_part() -> None:
    for path in SHIPPED:
        if is_within(module_name(path), ("vmkit.monitor",)):
            words = {word for text in find_texts(path) for word in re.findall(r"[a-z]+", text.lower())}
            assert not words & {part.name for part in PARTS}, path


def test_monitor_knows_parts_by_their_plans_alone() -> None:
    for path in SHIPPED:
        if is_within(module_name(path), ("vmkit.monitor",)):
            known = {
                name for name in imports_of(path) if is_within(name, ("vmkit.machine.parts", "vmkit.machine.qemu"))
            }
            assert known <= {"vmkit.machine.parts.part"}, path


def test_programs_are_started_in_few_places() -> None:
    found = set()
    for path, name in zip(SHIPPED, IDS, strict=True):
        if not name.startswith("vmkit/"):
            continue
        for node in walk(path):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.startswith(("subprocess.", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.system")) or (
                "create_subprocess" in called
            ):
                found.add(name)
    assert found == STARTS_PROGRAMS


def is_af_vsock(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "AF_VSOCK") or (
        isinstance(node, ast.Name) and node.id == "AF_VSOCK"
    )


def test_af_vsock_is_opened_where_it_may_be_denied() -> None:
    """On a machine that is itself a guest, a vsock socket leads to somebody else's host."""
    opens, knows = set(), set()
    for path, name in zip(SHIPPED, IDS, strict=True):
        for node in walk(path):
            knows |= {name} if is_af_vsock(node) else set()
            opens |= {name} if isinstance(node, ast.Call) and any(map(is_af_vsock, node.args)) else set()
    assert opens <= OPENS_AF_VSOCK
    assert knows <= KNOWS_AF_VSOCK
    for name in OPENS_AF_VSOCK:
        assert '"VSH_AF_VSOCK") == "deny"' in (CHECKOUT / name).read_text()


def test_every_module_says_what_it_is_for() -> None:
    documents = {name: ast.get_docstring(parse(path)) or "" for path, name in zip(SHIPPED, IDS, strict=True)}
    assert not [name for name, text in documents.items() if not re.match(r"[^\W\d_]|[`'\"]", text)]


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.name == "__init__.py"], ids=module_name)
def test_package_file_holds_no_logic(path: Path) -> None:
    body = parse(path).body
    if module_name(path) == "vmkit":
        # vmkit.Machine is loaded when it is used: the monitor and the device are of this package, and must stay small.
        assert [node.name for node in body if isinstance(node, ast.FunctionDef)] == ["__getattr__", "__dir__"]
        return
    assert all(isinstance(node, ast.Expr | ast.Import | ast.ImportFrom) for node in body)


def test_no_module_is_a_drawer() -> None:
    names = {part for path in SHIPPED for part in path.relative_to(CHECKOUT).with_suffix("").parts}
    assert not names & DRAWERS


def test_files_and_functions_are_short() -> None:
    assert not [name for path, name in zip(SHIPPED, IDS, strict=True) if count_lines(path) > LINES_OF_A_FILE]
    assert not [
        f"{node.name} in {name}"
        for path, name in zip(SHIPPED, IDS, strict=True)
        for node in walk(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LINES_OF_A_FUNCTION
    ]


def test_name_of_a_class_stands_for_one_thing() -> None:
    places: dict[str, set[str]] = {}
    for path, name in zip(SHIPPED, IDS, strict=True):
        for node in walk(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, set()).add(name)
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in TWINS} == {}
    assert {name for name in TWINS if len(places[name]) < 2} == set()


@pytest.mark.parametrize("name", ["vsh/errors.py", "vmkit/errors.py"])
def test_every_kind_of_error_says_when_it_is_raised(name: str) -> None:
    for node in walk(CHECKOUT / name):
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name


def test_errors_for_people_are_of_the_one_vocabulary() -> None:
    """Every class of an exception is VshError's kin, or is caught in the room that raises it, and says so."""
    assert not [
        f"{node.name} in {name} says nothing of when it is raised"
        for path, name in zip(SHIPPED, IDS, strict=True)
        for node in walk(path)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith(("Error", "Exception", "Exit")) for base in node.bases)
        and not ast.get_docstring(node)
    ]


def test_only_the_programs_exit_and_print_errors() -> None:
    for path, name in zip(SHIPPED, IDS, strict=True):
        if not name.startswith("vmkit/") or name.startswith("vmkit/cli/") or path.name == "__main__.py":
            continue
        programs = ("vmkit/forward/daemon.py", "vmkit/forward/namespace.py", "vmkit/shares/daemon.py")
        main = name in (*programs, "vmkit/shares/guard.py", "vmkit/machine/host_view.py")
        for node in walk(path):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called != "print" or name == "vmkit/forward/namespace.py", name
            assert main or called != "sys.exit", name
