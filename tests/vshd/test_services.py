"""The tables of what a connection, or the daemon, can become: names that resolve, budgets that hold, one way over."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from vshd.flags import OTHER_MODES, Options
from vshd.log import Log
from vshd.services.subsystem import SUBSYSTEMS, Row
from vshd.services.table import MODES, SERVICES, Mode, Service, find_service, run_mode
from vshd.wire.messages import SetupConnectionRequest
from vshd.wire.requests import Forward

CHECKOUT = Path(__file__).resolve().parents[2]
LOADED = """
import sys
sys.path.insert(0, {root!r})
import vshd.__main__, vshd.session.session
had = set(sys.modules)
import {module}
print(*set(sys.modules) - had)
"""


def modules_of(module: str) -> set[str]:
    """What loading a row's module brings into a daemon that serves sessions."""
    script = LOADED.format(root=str(CHECKOUT), module=module)
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("row", [*SERVICES, *MODES, *SUBSYSTEMS], ids=lambda row: str(row.name))
def test_row_keeps_its_import_budget(row: Service | Mode | Row) -> None:
    brought = modules_of(row.module)
    assert row.module in brought or row.module in sys.modules
    assert len(brought) <= row.budget, sorted(brought)


@pytest.mark.parametrize("service", SERVICES, ids=lambda row: row.name)
def test_service_has_what_a_row_needs(service: Service) -> None:
    module = importlib.import_module(service.module)
    assert all(callable(getattr(module, name)) for name in ("user_of", "describe"))
    assert callable(getattr(module, "serve" if service.is_own else "open_service"))
    assert service.field in SetupConnectionRequest.__slots__


@pytest.mark.parametrize("row", SUBSYSTEMS, ids=lambda row: row.name.decode())
def test_subsystem_has_what_a_row_needs(row: Row) -> None:
    assert callable(importlib.import_module(row.module).open_subsystem)


def test_subsystem_that_is_not_asked_for_is_not_loaded() -> None:
    assert not {row.module for row in SUBSYSTEMS} & modules_of("vshd.services.subsystem")


@pytest.mark.parametrize("mode", MODES, ids=lambda row: row.name)
def test_mode_has_an_entry_and_flags(mode: Mode) -> None:
    assert callable(getattr(importlib.import_module(mode.module), mode.entry))
    assert all(hasattr(Options(), flag) for flag in mode.flags)


def test_sessions_that_run_commands_load_no_service() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import vshd.__main__, vshd.server; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert not {row.module for row in (*SERVICES, *MODES, *SUBSYSTEMS)} & set(done.stdout.split())


def test_request_finds_its_service() -> None:
    assert find_service(SetupConnectionRequest(argv=[b"true"])) is None
    asked = find_service(SetupConnectionRequest(forward=Forward(connect=b"tcp:localhost:80", user=b"web")))
    assert asked is not None
    assert (asked.user, asked.describe()) == (b"web", "forward to tcp:localhost:80")


def test_flags_name_all_that_take_the_servers_place() -> None:
    assert {flag for mode in MODES for flag in mode.flags} == set(OTHER_MODES)


def test_no_mode_means_the_server() -> None:
    assert run_mode(Options(), Log()) is None
