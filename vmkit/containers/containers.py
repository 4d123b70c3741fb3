"""The containers of one running machine: made, listed, started, stopped and removed. The state is in the guest alone.

Each call is a session that runs the script of vmkit.containers.script. The guest's answers are text of anybody's.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vmkit.containers.plan import ARCHITECTURES, USER_MARK, ContainerPlan, plan_container
from vmkit.containers.script import EXPLAINED, RUNNING, STOPPED, render_script
from vmkit.errors import ConfigError, MachineError
from vmkit.machine.running import MachineHandle
from vmkit.roots.prepare import PreparedRoot, prepare_root
from vmkit.roots.source import parse_source
from vsh.address import address_of
from vsh.client import Client
from vsh.crun import NAME, check_name
from vsh.errors import ConnectionLost
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump, Source
from vsh.stdio import FdSource
from vshd.wire import messages

# A guest under emulation on a busy host needs seconds for each step.
CALL_TIMEOUT_S = 120.0
# A root of gigabytes, at some ten megabytes a second.
CREATE_TIMEOUT_S = 3600.0
STOP_TIMEOUT_S = 10
# A list of a thousand containers.
ANSWER_BYTES_MAX = 4 << 20
SAID_LINES = 5

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Container:
    """One container. state: "running" or "stopped". pid: of its first process in the guest, 0 when it is stopped.
    source: what it was made of. command: that of its first process; None: it waits for sessions.
    """

    name: str
    state: str
    pid: int
    source: str
    command: tuple[str, ...] | None


class Containers:
    """The containers of a running machine, whose guest has crun, as the image `containers` has.

    with vmkit.Machine("containers") as machine:
        containers = vmkit.Containers(machine)
        containers.create("web", "oci:./web")
        containers.start("web")
        containers.connect("web").run(["id"], check=True)
    """

    def __init__(self, machine: MachineHandle) -> None:
        self._machine = machine

    def create(self, name: str, source: str, command: Sequence[str] = (), *, progress: Progress | None = None) -> None:
        """Makes a container of a folder, a tar, oci:PATH[:TAG], docker-archive:PATH[:TAG], or - for standard input.

        command: for its first process, instead of the image's own command. Without either, the container waits for
        sessions. progress: is called with the current step. Raises UsageError, ConfigError, BuildError, HostError,
        MachineError. After an error nothing of the container is left.
        """
        check_name(name)
        parsed = parse_source(source)
        tell = progress or (lambda _text, _fraction: None)
        kind, *known = self._call(["look", name]).decode(errors="replace").split("\n")
        if kind not in ARCHITECTURES:
            raise ConfigError(f"vmkit makes no containers for the architecture '{kind[:40]}'")
        root = prepare_root(parsed, architecture=ARCHITECTURES[kind][0], progress=tell)
        if not root.key:
            raise ConfigError(
                f"{source} is a disk, and a container is made of files",
                hint="give a folder, a tar, oci:PATH or docker-archive:PATH",
            )
        plan = plan_container(name, root.settings, command, kind)
        tell("sending the root to the guest", None)
        self._send(name, root, plan, source, is_known=root.key in known)

    def list_all(self) -> list[Container]:
        """Returns the containers, by name. Raises MachineError."""
        found = (parse_line(line) for line in self._call(["list"]).decode(errors="replace").splitlines())
        return sorted((one for one in found if one is not None), key=lambda one: one.name)

    def start(self, name: str) -> None:
        """Starts the first process of a container. Raises UsageError, MachineError."""
        self._call(["start", check_name(name)])

    def stop(self, name: str, timeout: int = STOP_TIMEOUT_S) -> None:
        """Ends a container: SIGTERM for its first process, and after timeout seconds SIGKILL for all.

        Does nothing for a stopped one. Raises UsageError, MachineError.
        """
        self._call(["stop", check_name(name), str(timeout)], timeout_s=timeout + CALL_TIMEOUT_S)

    def remove(self, name: str, *, force: bool = False) -> None:
        """Removes a container, with all that was written in it. force: a running one, too, which is killed.

        Raises UsageError, MachineError.
        """
        self._call(["remove", check_name(name), "force" if force else ""])

    def connect(self, name: str) -> Client:
        """Returns a client for commands in a running container, as `vsh --target_container` runs them."""
        return Client(address_of(self._machine.find_entry()), container=check_name(name))

    def _send(self, name: str, root: PreparedRoot, plan: ContainerPlan, source: str, *, is_known: bool) -> None:
        size = 0 if is_known else root.path.stat().st_size
        variables = {
            "CONTAINER_CONFIG": plan.config,
            "CONTAINER_PROCESS": plan.process,
            "CONTAINER_VARIABLES": plan.env,
            "CONTAINER_CWD": plan.cwd,
            "CONTAINER_USER": plan.user,
            "CONTAINER_ABOUT": json.dumps({"source": source, "command": plan.command}),
        }
        words = ["create", name, root.key, str(size)]
        with root.path.open("rb") as file:
            reading: Source = BytesSource(b"") if is_known else FdSource(file.fileno())
            self._call(words, variables, reading, timeout_s=CREATE_TIMEOUT_S)

    def _call(
        self,
        words: Sequence[str],
        variables: Mapping[str, str] | None = None,
        source: Source | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> bytes:
        """Runs the script in the guest, and returns what it printed. Raises MachineError for a failure in the guest."""
        machine = self._machine.find_entry().name
        env = {**(variables or {}), "CONTAINER_MACHINE": machine}
        argv = ["/bin/sh", "-c", render_script(USER_MARK), "vmkit", *words]
        sinks = {stream: CaptureSink(ANSWER_BYTES_MAX) for stream in (messages.STDOUT, messages.STDERR)}
        with self._machine.connect().open_session(argv, env=env, user="root") as session:
            try:
                end = Pump(session, source or BytesSource(b""), dict(sinks)).run(time.monotonic() + timeout_s)
            except ConnectionLost as error:
                session.explain(error)
                raise
        said = sinks[messages.STDERR].take().decode(errors="replace").strip().split("\n")
        if end.code == EXPLAINED and not end.signal:
            raise MachineError(f"{machine}: {said[0]}", hint=said[1] if len(said) > 1 else "")
        if end.code or end.signal:
            how = f"signal {end.signal}" if end.signal else f"status {end.code}"
            raise MachineError(
                f"{machine}: the guest's part of `vmkit container {words[0]}` ended with {how}",
                details="\n".join(said[-SAID_LINES:]),
            )
        return sinks[messages.STDOUT].take()


def parse_line(line: str) -> Container | None:
    """Returns the container of a line that the guest has printed; None for another line."""
    fields = line.split("\t", 3)
    if len(fields) != 4 or not NAME.fullmatch(fields[0]) or fields[1] not in (RUNNING, STOPPED):
        return None
    name, state, pid, text = fields
    try:
        about = json.loads(text)
        command = None if about["command"] is None else tuple(str(word) for word in about["command"])
        return Container(name, state, int(pid), str(about["source"]), command)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
