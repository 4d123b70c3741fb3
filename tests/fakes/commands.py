"""A guest without a kernel that runs commands: a real vshd takes the place of the machine's vsock device.

The guest's files are the host's. It ends with the fake QEMU, however that ends.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
# PR_SET_PDEATHSIG, 1 of linux/prctl.h: SIGKILL when the fake QEMU ends.
START = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != {os.getpid()}:
    sys.exit(1)
sys.path.insert(0, {str(CHECKOUT)!r})
from vshd.__main__ import main
sys.exit(main())
"""
DEADLINE_S = 30.0


def serve(path: str) -> None:
    """path: of the machine's hybrid vsock. Returns when the guest can be connected to."""
    # The machine's own, which goes with it.
    folder = Path(path).parent / "vshd"
    folder.mkdir()
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(f"{folder}/notify")
    notify.settimeout(DEADLINE_S)
    user = [] if os.geteuid() == 0 else [f"--default_user={os.geteuid()}"]
    server = f"{folder}/vshd"
    subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", "-B", "-c", START, f"--listen=unix:{server}", "--log_stderr"),
            *("--spare_time=0", f"--lasting_dir={folder}/lasting", *user),
        ],
        env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": f"{folder}/notify", "VSH_AF_VSOCK": "deny"},
        stdin=subprocess.DEVNULL,
    )
    assert notify.recv(100) == b"READY=1\n"
    Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    Path(path).chmod(0o600)
    listener.listen()
    threading.Thread(target=accept, args=(listener, server), daemon=True).start()


def accept(listener: socket.socket, server: str) -> None:
    while True:
        client, _ = listener.accept()
        with client.makefile("rb", buffering=0) as head:
            head.readline()
        client.sendall(b"OK 1\n")
        guest = socket.socket(socket.AF_UNIX)
        guest.connect(server)
        for source, sink in ((client, guest), (guest, client)):
            threading.Thread(target=relay, args=(source, sink), daemon=True).start()


def relay(source: socket.socket, sink: socket.socket) -> None:
    """One direction. Its end is not the other's: vshd may end before a client's last bytes come."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for sock, end in ((source, socket.SHUT_RD), (sink, socket.SHUT_WR)):
        with contextlib.suppress(OSError):
            sock.shutdown(end)
