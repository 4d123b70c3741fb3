"""The monitor's entry: `python -m vmkit.monitor FD` waits on the socket FD for a plan, then owns the machine."""

import asyncio
import os
import sys

from vmkit.machine.handover import receive_plan
from vmkit.machine.launch import Layout
from vmkit.monitor.monitor import Monitor


def main(argv: list[str]) -> int:
    """Owns one machine from the plan that arrives on the socket named in argv[0]; returns the exit status."""
    os.umask(0o077)
    received = receive_plan(int(argv[0]))
    if received is None:
        return 0
    with (received.plan.directory / Layout.MONITOR_LOG).open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    received.reports.setblocking(False)

    async def run() -> int:
        return await Monitor(received.plan, received.reports, received.vhost_fd).run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
