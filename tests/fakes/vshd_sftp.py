"""vshd's SFTP service on standard input, which is a socket: a peer for copies that has vmkit's own extensions."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vshd.log import Log
from vshd.services.sftp.serving import open_subsystem
from vshd.signals import SIGTERM, Wakeup


def main() -> None:
    os.set_blocking(0, False)
    open_subsystem(str(Path.cwd())).run(os.dup(0), b"", Wakeup((SIGTERM,)), Log())


if __name__ == "__main__":
    main()
