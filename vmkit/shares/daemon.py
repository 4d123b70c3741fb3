"""The process that serves a share: `python -m vmkit.shares.daemon FD`, started by vmkit.shares.start.

It reads what to share as JSON from the socket FD. It sends back one line of JSON when the guest has the folder, or the
reason why it cannot. Then it serves until SIGTERM, or until the guest unmounts the folder or ends.
"""

import json
import os
import resource
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from vmkit.entries.numbered import make_numbered
from vmkit.errors import HostError, MachineError
from vmkit.shares.place import SharedPlace
from vmkit.shares.registry import SHARES, publish
from vmkit.shares.transports import connect
from vsh.errors import VshError
from vsh.signals import SIGINT, SIGTERM, Wakeup
from vshd.carry.inherited import settle_signals

MAX_REQUEST_BYTES = 1 << 16


def main() -> int:
    """Serves the share until a signal or its guest ends it."""
    settle_signals()
    # A request of the guest has the mode that its file gets.
    os.umask(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reports = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(reports.makefile("rb").readline(MAX_REQUEST_BYTES))
    wakeup = Wakeup((SIGTERM, SIGINT))
    machine = str(request["machine"])
    place = SharedPlace(Path(request["host"]), str(request["guest"]), bool(request["read_only"]))
    try:
        _share(machine, place, str(request["by"]), reports, wakeup)
    except VshError as error:
        if reports.fileno() < 0:
            return 1
        answer = {"brief": error.brief, "details": error.details, "hint": error.hint, "status": error.status}
        reports.sendall(json.dumps({"error": answer}).encode() + b"\n")
        return 1
    return 0


def _share(machine: str, place: SharedPlace, by: str, reports: socket.socket, wakeup: Wakeup) -> None:
    """Raises VshError."""
    folder = _open_folder(place)
    with make_numbered(SHARES) as entry:
        transport, connected = connect(machine, place, folder, by)
        try:
            share = publish(entry, machine, place, transport.name)
            become_owner(folder)

            def show() -> None:
                reports.sendall(json.dumps(asdict(share)).encode() + b"\n")
                reports.close()

            end = connected.serve(show, wakeup.fd, lambda: bool({SIGTERM, SIGINT} & set(wakeup.take())))
            if reports.fileno() >= 0:
                raise MachineError(f"{machine} did not mount {place.guest}: {end}")
        finally:
            connected.close()
            # The entry is root's.
            os.seteuid(os.getuid())


def _open_folder(place: SharedPlace) -> int:
    """The one time that a path of this host is followed wherever it leads: it is our user's own. Raises HostError."""
    try:
        return os.open(place.host, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot share {place.host}: {error.strerror}") from error


def become_owner(folder: int) -> None:
    """For root: becomes the folder's owner, so that what the guest makes is that user's, and root's power is not used.

    Raises HostError.
    """
    status = os.fstat(folder)
    if os.geteuid() != 0 or status.st_uid == 0:
        return
    try:
        os.setgroups([])
        os.setegid(status.st_gid)
        os.seteuid(status.st_uid)
    except OSError as error:
        raise HostError(f"cannot become the folder's owner, uid {status.st_uid}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
