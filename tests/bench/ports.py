"""What `vmkit forward --auto` costs an idle guest: `python -m tests.bench.ports [MACHINE] [--seconds 60]`.

Without MACHINE it starts one, and ends it. Prints which part of the guest's processor the process takes that looks for
listening ports, from its /proc/PID/stat, with one port and with several. Judges nothing.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from tests.bench.forwards import ready_machine
from vsh.address import find_by_name
from vsh.client import Client

PORTS = (1, 20)
DEADLINE_S = 120.0
# Runs in the guest: listens at so many ports.
LISTEN = """
import socket, sys, threading
kept = [socket.create_server(("127.0.0.1", 20000 + number)) for number in range(int(sys.argv[1]))]
print("up", flush=True)
threading.Event().wait()
"""
# Runs in the guest: the processor time of the watcher, then that again after some seconds, and the seconds. It is the
# process that has a socket of sock_diag (4), by the inode in the last column, or that has opened the kernel's table.
WATCH = """
import glob, os, sys, time
def find():
    inodes = {row.split()[-1] for row in open("/proc/net/netlink") if row.split()[1] == "4"}
    links = {f"socket:[{inode}]" for inode in inodes}
    for path in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            link = os.readlink(path)
            if link in links or link.endswith("/net/tcp"):
                return path.split("/")[2]
        except OSError:
            continue
def look(pid):
    words = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
pid, started = find(), time.monotonic()
before = look(pid)
time.sleep(float(sys.argv[1]))
print(pid, look(pid) - before, time.monotonic() - started)
"""


@contextlib.contextmanager
def listening(client: Client, count: int) -> Iterator[None]:
    with client.popen(["python3", "-c", LISTEN, str(count)], text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield
        process.kill()


@contextlib.contextmanager
def forwarding(machine: str, count: int) -> Iterator[None]:
    """A running `vmkit forward --auto` that has seen so many ports."""
    argv = [sys.executable, "-m", "vmkit", "forward", machine, "--auto", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for _ in range(count):
                json.loads(process.stdout.readline())
            yield
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", nargs="?", default="")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with ready_machine(options.machine) as name:
        client = Client(find_by_name(name))
        for count in PORTS:
            with listening(client, count), forwarding(name, count):
                words = ["python3", "-c", WATCH, str(options.seconds)]
                done = client.run(words, text=True, timeout=options.seconds + DEADLINE_S, check=True)
                _, used_s, seconds = map(float, done.stdout.split())
                part = 100 * used_s / seconds
                print(
                    f"  {count:4} ports: {part:5.2f} % of a processor ({used_s:.2f} s in {seconds:.1f} s)", flush=True
                )


if __name__ == "__main__":
    main()
