"""The process that runs the machine with a network; for a TAP, inside its network namespace.

`python3 -m vmkit.bench KIND NAME ACCELERATOR` (of vmkit.bench.network). It answers in lines on stdout: `up` when the
guest's sink listens. Each line of stdin is a number of bytes; its answer is the seconds of sending them. Any other
answer is an error, and the last. The end of stdin ends the machine.
"""

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator

from vmkit.bench.network import GUEST_ADDRESS, PREFIX_BITS, TAP, LinkKind, plan_tap
from vmkit.bench.sinks import CONNECT_TIMEOUT_S, SINK, time_sending
from vmkit.bench.testbed import IMAGE, SINK_PORT, plan_vsh, start_script
from vmkit.errors import HostError
from vmkit.forward.namespace import run_tool
from vmkit.machine.machine import Machine
from vsh.errors import VshError
from vshd.carry.inherited import settle_signals

SET_UP = f"modprobe virtio_net && ip link set eth0 up && ip addr add {GUEST_ADDRESS}/{PREFIX_BITS} dev eth0"
Place = tuple[str, int]


def choose_netdev(kind: LinkKind) -> tuple[str, Place]:
    """Returns QEMU's -netdev, and the address of the guest's sink from here."""
    if kind is LinkKind.TAP:
        return f"tap,ifname={TAP},script=no,downscript=no", (GUEST_ADDRESS, SINK_PORT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    # restrict=on: the guest cannot open connections.
    return f"user,restrict=on,hostfwd=tcp:127.0.0.1:{port}-{GUEST_ADDRESS}:{SINK_PORT}", ("127.0.0.1", port)


@contextlib.contextmanager
def _start(kind: LinkKind, name: str, accelerator: str) -> Iterator[Place]:
    """Starts the network, the machine and the sink in it."""
    if kind is LinkKind.TAP:
        for argv in plan_tap():
            run_tool(argv)
    netdev, place = choose_netdev(kind)
    with Machine(IMAGE, name=name, accelerator=accelerator, netdev=netdev) as machine, contextlib.ExitStack() as stack:
        done = machine.run(["sh", "-c", SET_UP], timeout=CONNECT_TIMEOUT_S)
        if done.exit != 0:
            raise HostError(f"the guest has no network: {done.stderr.decode(errors='replace').strip()}")
        start_script(stack, plan_vsh(machine.name), SINK, [SINK_PORT])
        yield place


def _answer(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(kind: str, name: str, accelerator: str) -> int:
    """Serves until the end of stdin."""
    settle_signals()
    # Unwinds the with-blocks, as Ctrl-C does: no machine is left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _start(LinkKind(kind), name, accelerator) as place:
            _answer("up")
            for line in sys.stdin:
                _answer(str(time_sending(socket.create_connection(place, CONNECT_TIMEOUT_S), int(line))))
    except (VshError, OSError) as error:
        _answer(error.brief if isinstance(error, VshError) else str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
