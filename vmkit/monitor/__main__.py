"""The monitor's entry: `python -m vmkit.monitor FD` waits on the socket FD for a plan, then owns the machine."""

import asyncio
import os
import resource
import sys

from vmkit.machine.handover import receive_plan
from vmkit.machine.launch import MIN_OPEN_FILES, Layout
from vmkit.monitor.monitor import Monitor
from vshd.carry.inherited import settle_signals


def main(argv: list[str]) -> int:
    """Owns one machine from the plan that arrives on the socket named in argv[0]; returns the exit status."""
    settle_signals()
    os.umask(0o077)
    _raise_open_files()
    received = receive_plan(int(argv[0]))
    if received is None:
        return 0
    with (received.plan.directory / Layout.MONITOR_LOG).open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    received.reports.setblocking(False)

    async def run() -> int:
        return await Monitor(received.plan, received.reports, received.vhost_fd, owner_fd=received.owner_fd).run()

    return asyncio.run(run())


def _raise_open_files() -> None:
    """A shell's soft limit is for programs that use select(2); this one does not, nor do its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        wanted = MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MIN_OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
