"""Machines for tests: from a pool that all processes of a test run share, and what is known of one that failed.

The first process that wants a kind of machine starts its pool. The pool ends with the run's first process (of
pytest-xdist: the controller), however that ends.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkit.errors import MachineError, NameInUseError
from vmkit.machine.launch import Layout
from vmkit.machine.options import make_spec
from vmkit.machine.running import dmesg, logs
from vmkit.packets.control import open_control
from vmkit.packets.lines import render_line
from vmkit.pool.pool import PooledMachine, PoolGoneError, RunningPool, find_pool, start_pool
from vmkit.pool.registry import read_pools
from vsh.errors import VshError
from vsh.text import clean_text, tail_lines

if TYPE_CHECKING:
    from vmkit.testing.wanted import Wanted

# A first pool builds its image and makes its snapshot.
TAKE_S = 300.0
EVIDENCE_LINES = 40


class Supply:
    """The pools of one test run. run: the process id that they end with. size: machines that wait in each."""

    def __init__(self, run: int, size: int) -> None:
        self._run = run
        self._size = size
        self._pools: dict[str, RunningPool] = {}

    def take(self, wanted: "Wanted") -> PooledMachine:
        """A fresh machine of this kind, which ends with this process at the latest. Raises VshError kinds."""
        try:
            machine = self._take(wanted)
        except PoolGoneError:
            # Another program has ended it.
            del self._pools[wanted.digest]
            machine = self._take(wanted)
        try:
            for path, content in wanted.files.items():
                _put(machine, path, content)
        except BaseException:
            machine.kill()
            raise
        return machine

    def end(self) -> None:
        """Ends the pools of this run, whichever process has started them."""
        # A pool that cannot be reached now ends with the run's first process.
        with contextlib.suppress(VshError):
            for entry in read_pools():
                if entry.name.startswith(self._prefix):
                    with contextlib.suppress(MachineError):
                        RunningPool(entry).stop()

    @property
    def _prefix(self) -> str:
        return f"test-{self._run}-"

    def _take(self, wanted: "Wanted") -> PooledMachine:
        pool = self._pools.get(wanted.digest)
        if pool is None:
            pool = self._pools[wanted.digest] = self._find_pool(wanted.digest, wanted.options)
        return pool.take(TAKE_S)

    def _find_pool(self, digest: str, options: Mapping[str, Any]) -> RunningPool:
        name = self._prefix + digest
        words = dict(options)
        spec = make_spec(str(words.pop("image", "tiny")), words)
        try:
            return RunningPool(start_pool(spec, size=self._size, name=name, owner=self._run))
        except NameInUseError:
            # Another process of this run was faster.
            return find_pool(name)


def read_evidence(machine: PooledMachine) -> dict[str, str]:
    """What explains a failure: the last lines of each log, by a title. The machine may have ended."""
    found: dict[str, str] = {}
    for kind in ("console", "events"):
        with contextlib.suppress(VshError, OSError):
            found[f"{kind} of {machine.name}"] = tail_lines(logs(machine.name, kind), EVIDENCE_LINES)
    with contextlib.suppress(VshError, OSError):
        lines = dmesg(machine.name)[-EVIDENCE_LINES:]
        found[f"kernel log of {machine.name}"] = clean_text("\n".join(line.text for line in lines))
    # The device of a machine that has ended is gone.
    with contextlib.suppress(VshError, OSError), open_control(machine.directory / Layout.VSOCK_CONTROL) as device:
        packets = device.ask_recent()[-EVIDENCE_LINES:]
        found[f"last packets of {machine.name}"] = "\n".join(map(render_line, packets))
    return {title: text for title, text in found.items() if text.strip()}


def count_cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _put(machine: PooledMachine, path: str, content: str | bytes | Path) -> None:
    if isinstance(content, bytes):
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1"'
        machine.run(["sh", "-c", script, "sh", path], input=content, check=True)
    else:
        machine.push(os.fspath(content), path)
