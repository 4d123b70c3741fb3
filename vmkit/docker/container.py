"""Runs one container as a with-block: makes, attaches, starts, waits, takes the results, removes.

The container ends with this process in every case. The block's end removes it. The leash (vmkit.docker.__main__) ends
it when this process has no time for that. At the latest, the sweep at the start of the next command removes it.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkit.docker.devices import Passed
from vmkit.docker.results import write_results
from vmkit.docker.stream import Terminal, pump, write_here
from vmkit.errors import ConfigError, HostError
from vsh.session import STATUS_MAX
from vsh.stdio import is_background

if TYPE_CHECKING:
    from docker import APIClient

LABEL = "org.vmkit.client"
RESULTS = "/results"
LEASH = ("python3", "-m", "vmkit.docker", "--")
# After an interruption: the command has this long for its own end. vmkit.cli.program gives all of it 20 s.
INTERRUPT_S = 5


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The options of a run. interactive: the container gets our stdin; tty: our terminal. out: folder for /results."""

    image: str
    command: tuple[str, ...]
    passed: Passed
    interactive: bool = False
    tty: bool = False
    network: str = "none"
    user: str = ""
    out: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_container(spec: RunSpec, client: str) -> dict[str, Any]:
    """Returns the body of the Engine API's ContainerCreate. It never has privileges or added capabilities."""
    host: dict[str, Any] = {
        "NetworkMode": spec.network,
        "Devices": [
            {"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rw"} for path in spec.passed.devices
        ],
        "GroupAdd": [str(group) for group in spec.passed.groups],
    }
    if spec.passed.vsock:
        from vmkit.docker.seccomp import render_profile  # noqa: PLC0415  (long, and seldom needed)

        host["SecurityOpt"] = [f"seccomp={render_profile()}"]
    environment = {**spec.passed.environment(), **spec.environment}
    return {
        "Image": spec.image,
        "Cmd": [*(() if spec.interactive else LEASH), *spec.command],
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "Labels": {LABEL: client},
        "User": spec.user,
        "Tty": spec.tty,
        "OpenStdin": True,
        # The engine ends the container's stdin when we go, even when we are killed.
        "StdinOnce": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "HostConfig": host,
    }


def run_container(engine: "APIClient", spec: RunSpec, tell: Callable[[str], None]) -> int:
    """Runs the command with our streams as its own; returns its exit status. tell: a line for a person."""
    sweep(engine, tell)
    with _open_container(engine, plan_container(spec, describe_client())) as container:
        stream = engine.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        connection: socket.socket = getattr(stream, "_sock", stream)
        with contextlib.ExitStack() as stack:
            stack.callback(_close, stream, connection)
            try:
                status = _run(engine, container, connection, spec)
            except BaseException:
                _interrupt(engine, container)
                with contextlib.suppress(Exception):
                    _take_results(engine, container, spec, tell)
                raise
        _take_results(engine, container, spec, tell)
    return status


def _run(engine: "APIClient", container: str, connection: socket.socket, spec: RunSpec) -> int:
    connection.settimeout(None)
    engine.start(container)
    with contextlib.ExitStack() as stack:
        terminal = None
        if spec.tty:
            terminal = stack.enter_context(Terminal(lambda rows, columns: engine.resize(container, rows, columns)))
        pump(connection, terminal=terminal, stdin=0 if spec.interactive else None, write=write_here)
    answer = engine.wait(container)
    if answer.get("Error"):
        raise HostError("the container broke", details=str(answer["Error"]))
    status = int(answer["StatusCode"])
    # The low byte of 256 is that of success.
    if not 0 <= status <= STATUS_MAX:
        raise HostError(f"the engine reported the exit status {status}, which no process can have")
    return status


@contextlib.contextmanager
def _open_container(engine: "APIClient", config: Mapping[str, Any]) -> Iterator[str]:
    container = str(engine.create_container_from_config(dict(config))["Id"])
    try:
        yield container
    finally:
        with contextlib.suppress(Exception):
            engine.remove_container(container, force=True, v=True)


def _close(stream: Any, connection: socket.socket) -> None:
    """Closes the response before its stream: the SDK prints a complaint when the response's stream is closed first."""
    getattr(stream, "_response", stream).close()
    connection.close()


def _interrupt(engine: "APIClient", container: str) -> None:
    """Sends the command SIGINT, as Ctrl-C does. It has INTERRUPT_S before the caller removes the container."""
    with contextlib.suppress(Exception):
        engine.kill(container, "SIGINT")
        engine.wait(container, timeout=INTERRUPT_S)


def _take_results(engine: "APIClient", container: str, spec: RunSpec, tell: Callable[[str], None]) -> None:
    if spec.out is None:
        return
    chunks, _ = engine.get_archive(container, RESULTS)
    files = write_results(chunks, spec.out)
    tell(f"{len(files)} files of results in {spec.out}" if files else f"no results: nothing was in {RESULTS}")


def describe_client() -> str:
    """Returns a text that is unique to this process: the host's boot, our pid, and our start time."""
    return f"{_read_boot()} {os.getpid()} {_read_start(os.getpid())}"


def sweep(engine: "APIClient", tell: Callable[[str], None]) -> None:
    """Removes the containers of this host's dead clients."""
    for container in engine.containers(all=True, filters={"label": LABEL}):
        boot, _, rest = str(container["Labels"].get(LABEL, "")).partition(" ")
        pid, _, start = rest.partition(" ")
        if boot != _read_boot() or not pid.isdecimal() or (start and _read_start(int(pid)) == start):
            continue
        engine.remove_container(container["Id"], force=True, v=True)
        tell(f"removed the container {str(container['Id'])[:12]} of a vmkit that was killed")


def check_terminal(*, asked: bool) -> bool:
    """Whether the container gets our terminal. Raises ConfigError when one is asked for and there is none."""
    hint = "run a command instead: vmkit docker run -- CMD"
    there = sys.stdin.isatty() and sys.stdout.isatty()
    if asked and not there:
        raise ConfigError("stdin is no terminal", hint=hint)
    if there and is_background(0):
        if asked:
            raise ConfigError("another job has the terminal", hint=hint)
        return False
    return there


def _read_boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _read_start(pid: int) -> str:
    """proc(5), /proc/PID/stat, field 22: starttime. Empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
