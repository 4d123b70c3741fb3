"""What every test stands on: AF_VSOCK is denied before anything is imported.

On a machine that is itself a guest it leads to somebody else's host.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

with contextlib.suppress(ImportError):
    # Its plugin imports it at the very end. By then CPython 3.11 may have lost count of how deep its parser is, which
    # tests of deep nesting leave wrong, and compiles no large module any more. Guests that run tests have none.
    import hypothesis

    # The same cases in every run: a change is judged by its own faults. `make fuzz` looks for new cases.
    # Tests never time: a process that waited for a core is no fault of the code.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
    hypothesis.settings.load_profile("repeatable")

os.environ["VSH_AF_VSOCK"] = "deny"
# Where a user sets it, each program that tests start would compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A test that wants one sets it on. No other is held up by a builder, or gets a restore where it expects a boot.
os.environ["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
# A shell starts what runs in its background with these ignored, and every program below would inherit that: those that
# the tests interrupt would never hear of it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
# nohup ignores this one, and a program under nohup goes on where a test expects its end.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Fixtures that start programs, and modules whose tests do so themselves: `make quick` leaves them out.
STARTS_PROCESSES = {
    "archive", "boot", "built", "client", "docker", "fake_spec", "guest", "hybrid", "installed", "machine", "make_deb",
    "make_qemu", "modern", "program", "registered", "runtime", "start_guarded", "start_guest", "start_vshd", "tools",
    "up", "vhost", "vshd",
}  # fmt: skip
PROCESS_MODULES = (
    "tests/docker/", "tests/docs/", "tests/fuzz/", "tests/test_docker_script.py", "tests/test_lint.py",
    "tests/test_programs.py", "tests/test_release.py", "tests/test_wheel.py", "tests/vmkit/bench/",
    "tests/vmkit/cli/", "tests/vmkit/docker/", "tests/vmkit/forward/", "tests/vmkit/image/formats/test_tar.py",
    "tests/vmkit/image/debian/", "tests/vmkit/image/recipe/test_template.py", "tests/vmkit/image/test_build.py",
    "tests/vmkit/machine/test_handover.py", "tests/vmkit/machine/test_limits.py", "tests/vshd/test_proto3.py",
    "tests/vmkit/machine/test_owner.py", "tests/vmkit/machine/test_start.py", "tests/vmkit/machine/test_stop.py",
    "tests/vmkit/monitor/", "tests/vmkit/roots/", "tests/vmkit/test_run.py", "tests/vmkit/vsock/test_lifecycle.py",
    "tests/vmkit/vsock/test_sandbox.py", "tests/vsh/forward/test_forward.py", "tests/vsh/test_background.py",
    "tests/vsh/test_debug.py", "tests/vsh/test_faults.py", "tests/vsh/test_limits.py",
    "tests/vsh/test_patience.py", "tests/vsh/test_shared_terminal.py", "tests/vsh/test_streams.py",
    "tests/vsh/test_stuck_peer.py", "tests/vsh/test_terminal.py",
    "tests/vsh/test_upstream_faults.py", "tests/vshd/test_bulk.py", "tests/vshd/test_conduit.py",
    "tests/vshd/test_imports.py", "tests/vshd/test_inetd.py", "tests/vshd/test_init.py", "tests/vshd/test_mapping.py",
    "tests/vshd/test_server.py", "tests/vshd/test_services.py", "tests/vshd/test_strangers.py",
    "tests/vmkit/machine/test_save.py", "tests/vmkit/machine/test_ending.py", "tests/vmkit/machine/test_restore.py",
    "tests/vmkit/image/test_temporary.py", "tests/vmkit/image/test_needs.py", "tests/vshd/test_root.py",
    "tests/vsh/test_host_listeners.py", "tests/vshd/test_guest_exec.py",
    "tests/vmkit/machine/test_stored.py", "tests/vmkit/stored/", "tests/vmkit/matrix/test_cellfolder.py",
    "tests/vmkit/shares/",
)  # fmt: skip
# These carry much data or many connections through one process: half of the time of all that start no programs.
LOAD_MODULES = (
    "tests/vmkit/vsock/test_ceilings.py", "tests/vmkit/vsock/test_hostile_guest.py",
    "tests/vmkit/vsock/test_refused_messages.py", "tests/vmkit/vsock/test_traffic.py",
    "tests/vmkit/vsock/test_two_peers.py", "tests/vmkit/vsock/test_faults.py", "tests/vmkit/vsock/test_trace.py",
    "tests/vmkit/vsock/test_small_buffers.py", "tests/vshd/test_branches.py", "tests/vshd/test_bridge.py",
    "tests/vshd/test_sockets.py", "tests/vshd/test_sftp_serving.py", "tests/vshd/test_audit.py",
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves modules unread that the expression of -m leaves out whole: reading them takes seconds of `make quick`."""
    expression = config.getoption("markexpr")
    left_out = ("not process" in expression) * PROCESS_MODULES + ("not load" in expression) * LOAD_MODULES
    name = str(collection_path.relative_to(config.rootpath)) if collection_path.is_relative_to(config.rootpath) else ""
    return True if collection_path.is_file() and name.startswith(left_out) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that start programs, by what they use, and skips those of root for other users."""
    root = config.rootpath
    for item in items:
        name = str(item.path.relative_to(root)) if item.path.is_relative_to(root) else ""
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="only root can become another user or give files to one"))
        if name.startswith(PROCESS_MODULES) or STARTS_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")
        if name.startswith(LOAD_MODULES):
            item.add_marker("load")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist, which guests that run tests lack: deals files so that only two workers have machines."""
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.dealer import Dealer  # noqa: PLC0415

    return Dealer(config, log)
