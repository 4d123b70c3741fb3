"""The host and the programs that a benchmark ran with: facts that readers of its figures need."""

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from vmkit.bench.network import find_network
from vmkit.bench.testbed import MEMORY, Track
from vmkit.run import run
from vsh.errors import VshError
from vshd.wire.version import __version__

TIMEOUT_S = 20.0
GUEST_QUESTIONS = {
    "guest kernel": ["uname", "-r"],
    "guest Python": ["python3", "-c", "import sys; print(sys.version.split()[0])"],
    "guest OpenSSH": ["sh", "-c", "ssh -V 2>&1"],
}


def gather_facts(track: Track) -> dict[str, str]:
    """Returns the facts that it can find, and leaves out the others."""
    started = track.machine.started
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "vmkit": __version__,
        "processor": _read_processor(),
        "processors": str(os.cpu_count()),
        "memory": _read_memory(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "host kernel": platform.release(),
        "host Python": platform.python_version(),
        "accelerator": str(started.choices.accelerator.value),
        "backend": str(started.choices.backend.value),
        "image": f"bench, {MEMORY}",
        "ssh transport": "vsock, descriptor passed to ssh (ProxyUseFdpass): no relay in between",
        "virtual network": find_network().render(),
        "fastest cipher": track.fastest_cipher,
    }
    for name, argv in {
        "QEMU": ["qemu-system-x86_64", "--version"],
        "host OpenSSH": ["sh", "-c", "ssh -V 2>&1"],
        "default cipher": ["sh", "-c", _DEFAULT_CIPHER, "sh", *track.ssh],
        "socat": ["sh", "-c", "socat -V | sed -n 2p"],
    }.items():
        with contextlib.suppress(VshError):
            facts[name] = _first_line(run(argv, timeout_s=TIMEOUT_S))
    for name, question in GUEST_QUESTIONS.items():
        with contextlib.suppress(VshError):
            facts[name] = _first_line(track.api.run(question).stdout)
    return {name: value for name, value in facts.items() if value}


_DEFAULT_CIPHER = '"$@" -v true 2>&1 | sed -n "s/.*kex: client->server cipher: \\([^ ]*\\).*/\\1/p"'


def _first_line(output: bytes) -> str:
    lines: Sequence[str] = output.decode(errors="replace").strip().splitlines()
    return lines[0].strip() if lines else ""


def _read_processor() -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().partition("model name")[2].split(":", 1)[1].splitlines()[0].strip()
    return platform.machine()


def _read_memory() -> str:
    with contextlib.suppress(OSError, IndexError, ValueError):
        kib = int(Path("/proc/meminfo").read_text().split()[1])
        return f"{kib / (1 << 20):.0f} GiB"
    return ""
