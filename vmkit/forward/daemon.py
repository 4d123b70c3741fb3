"""The process that keeps a forward: `python -m vmkit.forward.daemon FD`, started by vmkit.forward.start.

It reads its forwards as JSON from the socket FD. It sends back one line of JSON when it listens, or the reason why it
cannot. Then it serves until SIGTERM, also while the machine is gone.
"""

import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from vmkit.forward.registry import LOG, keep
from vsh.address import Address, find_by_name
from vsh.errors import VshError
from vsh.forward.forwarder import Forwarder
from vsh.forward.spec import ForwardSpec
from vsh.signals import SIGINT, SIGTERM, Wakeup
from vshd.carry.inherited import settle_signals

MAX_REQUEST_BYTES = 1 << 20
# A log that is longer starts anew at the next line.
MAX_LOG_BYTES = 64 * 1024


def main() -> int:
    """Keeps the forward until a signal or its machine ends it."""
    settle_signals()
    reports = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(reports.makefile("rb").readline(MAX_REQUEST_BYTES))
    wakeup = Wakeup((SIGTERM, SIGINT))
    forwards = [ForwardSpec(*words) for words in request["forwards"]]
    machine, user = str(request["machine"]), str(request["user"])
    try:
        with keep(machine, tuple(map(str, forwards))) as entry:

            def tell(text: str) -> None:
                _log(entry.directory / LOG, text)

            def find() -> Address:
                return find_by_name(machine)

            with Forwarder(find, forwards, user=user, tell=tell, is_lasting=True) as forwarder:
                kept = entry.publish(tuple(forwarder.listening))
                reports.sendall(json.dumps(asdict(kept)).encode() + b"\n")
                reports.close()
                forwarder.run(wakeup.fd)
    except VshError as error:
        if reports.fileno() < 0:
            return 1
        answer = {"brief": error.brief, "details": error.details, "hint": error.hint, "status": error.status}
        reports.sendall(json.dumps({"error": answer}).encode() + b"\n")
        return 1
    return 0


def _log(path: Path, text: str) -> None:
    """Appends a line to the log. A log over the ceiling begins anew."""
    try:
        is_full = path.exists() and path.stat().st_size > MAX_LOG_BYTES
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if is_full else os.O_APPEND), 0o600)
        try:
            os.write(fd, f"{text}\n".encode("utf-8", "replace"))
        finally:
            os.close(fd)
    except OSError:
        pass


if __name__ == "__main__":
    sys.exit(main())
