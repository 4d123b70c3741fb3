"""A virtual network to a machine of the race's own: the ceiling of its forwards, for machines that have no network.

Best is a TAP device, with the host's kernel on one side and QEMU's virtio-net on the other. It is in a network
namespace that needs no privilege and is gone with its process. When the host refuses that, QEMU's user-mode network
(slirp) replaces it: a TCP stack in QEMU itself, with a port of loopback. Neither touches the host's network. Another
process runs in the namespace, vmkit.bench.__main__: it has the machine, and sends the data.
"""

import contextlib
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from vmkit.bench.programs import Running
from vmkit.errors import CommandError, HostError
from vmkit.forward.namespace import ENTER, render_entry_environment, render_tools_environment
from vmkit.run import run

# slirp's own numbers, so that the guest is set up the same way for both.
HOST_ADDRESS, GUEST_ADDRESS, PREFIX_BITS = "10.0.2.2", "10.0.2.15", 24
TAP = "vmkit0"
PROBE_TIMEOUT_S = 20.0
# What ends a machine has deadlines of its own, all together shorter than this.
END_DEADLINE_S = 20.0
# A start or a transfer: both have deadlines of their own on the other side.
ANSWER_DEADLINE_S = 300.0


class LinkKind(StrEnum):
    """The host's side of the guest's network device."""

    TAP = "tap"
    SLIRP = "slirp"


@dataclass(frozen=True, slots=True)
class Network:
    """The network that this host allows. reason: why it is not the better one."""

    kind: LinkKind
    reason: str = ""

    def render(self) -> str:
        """Returns a text for people who read the figures."""
        if self.kind is LinkKind.TAP:
            return "a TAP in a network namespace, virtio-net in QEMU (no vhost-net), 1500 bytes of MTU, offloads on"
        return f"QEMU's user-mode network (slirp): no TAP ({self.reason})"


def plan_tap() -> list[list[str]]:
    """Returns the commands that make the host's end, inside the namespace."""
    return [
        ["ip", "tuntap", "add", "dev", TAP, "mode", "tap"],
        ["ip", "addr", "add", f"{HOST_ADDRESS}/{PREFIX_BITS}", "dev", TAP],
        ["ip", "link", "set", TAP, "up"],
    ]


def find_network() -> Network:
    """Finds the network of this host by making a TAP in a temporary namespace."""
    make, *_ = plan_tap()
    try:
        run([*ENTER, *make], timeout_s=PROBE_TIMEOUT_S, env=render_tools_environment())
    except CommandError as error:
        return Network(LinkKind.SLIRP, error.details.splitlines()[-1])
    except HostError as error:
        return Network(LinkKind.SLIRP, error.brief)
    return Network(LinkKind.TAP)


@contextlib.contextmanager
def open_network(network: Network, name: str, accelerator: str) -> Iterator[Callable[[int], float]]:
    """Starts a machine of that name with a network. Yields a function that sends bytes by TCP and returns the seconds.

    Raises HostError at the start, and when the function sends.
    """
    enter = ENTER if network.kind is LinkKind.TAP else ()
    argv = [*enter, sys.executable, "-P", "-m", "vmkit.bench", network.kind.value, name, accelerator]
    with Running(argv, env=render_entry_environment()) as running:
        try:
            if (answer := _read_answer(running)) != "up":
                raise HostError(answer)
            yield lambda size: _ask(running, size)
        finally:
            # The end of its stdin ends it, also when we are killed.
            running.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(END_DEADLINE_S)


def _ask(running: Running, size: int) -> float:
    running.stdin.write(f"{size}\n".encode())
    answer = _read_answer(running)
    try:
        return float(answer)
    except ValueError as error:
        raise HostError(answer) from error


def _read_answer(running: Running) -> str:
    if not select.select([running.stdout], [], [], ANSWER_DEADLINE_S)[0]:
        return "the machine with a network does not answer"
    return running.stdout.readline().decode(errors="replace").strip() or "the machine with a network has ended"
