"""Many short connections through a forward: `python -m tests.bench.forwards [MACHINE]`.

Without MACHINE it starts one, and ends it. Prints; judges nothing. A connection is: connect, send a word, get it back,
close. A client that was refused, dropped or answered wrongly is counted as lost.

in turn    COUNT connections, one after another (1,000)
at once    CLIENTS clients at once, one connection each (50), in ROUNDS rounds

Both go to an echo in the guest: at a vsock port, which a forward reaches directly, and at a TCP port, for which its
vshd serves a forward in one session. The same from the guest to an echo here (-R), with the clients in one program of
the guest.

bulk       MEGABYTES through one connection to a sink in the guest and from a source there, ROUNDS times, alternating:
           a branch of the forward's session, and a session of its own as before there were branches
"""

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.vsh.forward.servers import Echo, serving
from vmkit.forward.start import open_forwards
from vmkit.machine.machine import Machine
from vsh.address import find_by_name
from vsh.client import Client
from vsh.forward.spec import LOCAL, REMOTE, parse_forward

VSOCK_PORT, TCP_PORT, BACK_PORT, BULK_PORT = 7011, 7012, 7013, 7014
# As patient as a person: a forward that serves later than this might as well not.
PATIENCE_S = 600.0

# Runs in the guest: echoes at a vsock port and at a TCP port, each connection in a thread.
ECHOES = f"""
import socket, threading
def serve(connection):
    try:
        while data := connection.recv(1 << 16):
            connection.sendall(data)
    except OSError:
        pass
    connection.close()
def listen(family, address, serve=serve):
    server = socket.socket(family)
    server.bind(address)
    server.listen(1024)
    while True:
        connection, _ = server.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()
def move(connection):
    block = memoryview(bytearray(1 << 18))
    order = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
    for _ in range(order):
        connection.sendall(block)
    while not order and connection.recv_into(block):
        pass
    connection.close()
threading.Thread(target=listen, args=(socket.AF_INET, ("127.0.0.1", {BULK_PORT}), move), daemon=True).start()
threading.Thread(target=listen, args=(socket.AF_VSOCK, (0xFFFFFFFF, {VSOCK_PORT})), daemon=True).start()
threading.Thread(target=listen, args=(socket.AF_INET, ("127.0.0.1", {TCP_PORT})), daemon=True).start()
print("up", flush=True)
threading.Event().wait()
"""
# Runs here and in the guest: seconds of all, then of each connection, -1 for a lost one.
CLIENTS = f"""
import socket, sys, threading, time
def ask(port, took, index):
    started = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", port), {PATIENCE_S}) as client:
            client.sendall(b"word")
            data = b""
            while len(data) < 4 and (more := client.recv(4)):
                data += more
        took[index] = time.monotonic() - started if data == b"word" else -1.0
    except OSError:
        took[index] = -1.0
def run(port, count, at_once):
    took = [-1.0] * count
    if not at_once:
        for index in range(count):
            ask(port, took, index)
        return took
    threads = [threading.Thread(target=ask, args=(port, took, index)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took
port, count, at_once = map(int, sys.argv[1:])
started = time.monotonic()
took = run(port, count, bool(at_once))
print(time.monotonic() - started, *took)
"""


# A vsh that asks for a session for each connection, as it does with a vshd that knows no branches.
WITHOUT_BRANCHES = """
from vsh.forward import trunk
trunk.open_trunk = lambda *_: None
from vsh.__main__ import main
main()
"""
BLOCK = 1 << 18


def show(name: str, rounds: list[list[float]], seconds: list[float]) -> None:
    """One line: the time of all, of the middle and of the slowest connection, and how many were lost."""
    took = [one for round_ in rounds for one in round_]
    served = [one for one in took if one >= 0] or [0.0]
    print(
        f"  {name:<34} {statistics.median(seconds):8.2f} s   median {statistics.median(served) * 1000:8.1f} ms"
        f"   slowest {max(served) * 1000:8.1f} ms   n {len(took):5}   lost {len(took) - len(served)}",
        flush=True,
    )


def measure(name: str, argv: list[str], port: int, count: int, clients: int, rounds: int) -> None:
    """Both loads through one forward."""
    for label, at_once, number, times in (("in turn", 0, count, 1), ("at once", 1, clients, rounds)):
        results, seconds = [], []
        for _ in range(times):
            words = [*argv, str(port), str(number), str(at_once)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=True)
            all_s, *took = map(float, done.stdout.split())
            seconds.append(all_s)
            results.append(took)
        show(f"{name}, {number} {label}", results, seconds)


@contextlib.contextmanager
def forwarding_bulk(machine: str, *words: str) -> Iterator[int]:
    """A vsh that forwards to the guest's mover of bulk; its port."""
    argv = [sys.executable, *words, f"--vm_name={machine}", "-v", "-N", "-L", f"0:127.0.0.1:{BULK_PORT}"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield int(process.stderr.readline().split(" at ")[1].split(" for ")[0].rpartition(":")[2])
        finally:
            process.terminate()


def move(port: int, megabytes: int, *, is_out: bool) -> float:
    """Seconds for so much out of the guest, or into it."""
    blocks, buffer = (megabytes << 20) // BLOCK, bytearray(BLOCK)
    started_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall((blocks if is_out else 0).to_bytes(8, "little"))
        for _ in range(0 if is_out else blocks):
            client.sendall(buffer)
        client.shutdown(socket.SHUT_WR)
        while client.recv_into(buffer):
            pass
    return time.monotonic() - started_s


def measure_bulk(machine: str, megabytes: int, rounds: int) -> None:
    """Branches against sessions, in turn."""
    sides = {"a branch": ("-m", "vsh"), "a session": ("-c", WITHOUT_BRANCHES)}
    took: dict[tuple[str, bool], list[float]] = {}
    with contextlib.ExitStack() as stack:
        ports = {name: stack.enter_context(forwarding_bulk(machine, *words)) for name, words in sides.items()}
        for number in range(rounds + 1):
            for name in sorted(ports, reverse=bool(number % 2)):
                for is_out in (False, True):
                    seconds = move(ports[name], megabytes if number else 1, is_out=is_out)
                    if number:
                        took.setdefault((name, is_out), []).append(seconds)
    for (name, is_out), seconds_ in sorted(took.items()):
        speeds = [megabytes * 1.048576 / seconds for seconds in seconds_]
        print(
            f"  bulk {'out' if is_out else 'in '} through {name:<10} median {statistics.median(speeds):6.1f} MB/s"
            f"   {min(speeds):6.1f} to {max(speeds):6.1f}   n {len(speeds)}",
            flush=True,
        )


@contextlib.contextmanager
def echoing(client: Client) -> Iterator[None]:
    with client.popen(["python3", "-c", ECHOES], text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield
        process.kill()


@contextlib.contextmanager
def ready_machine(name: str) -> Iterator[str]:
    if name:
        yield name
        return
    with Machine("tiny") as machine:
        yield machine.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", nargs="?", default="")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256, help="0: no bulk")
    options = parser.parse_args()
    loads = (options.count, options.clients, options.rounds)
    here = [sys.executable, "-c", CLIENTS]
    with ready_machine(options.machine) as name, serving(Echo) as echo, echoing(Client(find_by_name(name))):
        there = [sys.executable, "-m", "vsh", f"--vm_name={name}", "--", "python3", "-c", CLIENTS]
        for label, forward, argv, port in (
            ("-L to a vsock port", parse_forward(LOCAL, f"0:{VSOCK_PORT}"), here, 0),
            ("-L to a TCP port", parse_forward(LOCAL, f"0:127.0.0.1:{TCP_PORT}"), here, 0),
            ("-R to a TCP port", parse_forward(REMOTE, f"{BACK_PORT}:{echo}"), there, BACK_PORT),
        ):
            with open_forwards(name, [forward]) as kept:
                measure(label, argv, port or int(kept.listening[0].rpartition(":")[2]), *loads)
        if options.megabytes:
            measure_bulk(name, options.megabytes, options.rounds)


if __name__ == "__main__":
    main()
