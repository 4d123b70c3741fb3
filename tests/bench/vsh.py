"""The numbers of vsh and vshd without a VM: `python -m tests.bench.vsh [--quick]`.

Every comparison alternates its sides in one run and shows medians. Nothing here is a test: machines differ, ratios
less.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.vsh.live import ENVIRONMENT, Vshd
from vsh.address import Address
from vsh.client import Client
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump
from vshd.wire import messages

GIB = 1 << 30


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def alternate(count: int, **sides: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each side, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


def show(what: str, value: float, unit: str, note: str = "") -> None:
    print(f"{what:<58} {value:>9.2f} {unit:<6} {note}")


def bench_exec(server: Vshd, count: int) -> dict[str, float]:
    clients = {
        mode: Client(Address.unix(str(server.path)), extended=mode == "extended") for mode in ("extended", "legacy")
    }
    times = alternate(
        count,
        local=lambda: subprocess.run(["true"], check=True),
        extended=lambda: clients["extended"].run(["true"]),
        legacy=lambda: clients["legacy"].run(["true"]),
    )
    show("subprocess.run(['true'])", times["local"] * 1e3, "ms")
    for mode in clients:
        show(
            f"Client.run(['true']), {mode}", times[mode] * 1e3, "ms", f"{times[mode] / times['local']:.1f} times local"
        )
    return times


def bench_process(server: Vshd, count: int, warm: float) -> None:
    scripts = shutil.which("vsh", path=str(Path(sys.executable).parent))
    sides: dict[str, Callable[[], object]] = {
        "bare": lambda: subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True),
        "module": lambda: subprocess.run(
            [sys.executable, "-m", "vsh", f"--unix={server.path}", "--", "true"], env=ENVIRONMENT, check=True
        ),
        "launcher": lambda: subprocess.run(
            [*LAUNCHER, f"--unix={server.path}", "--", "true"], env=ENVIRONMENT, check=True
        ),
    }
    if scripts:
        sides["console script"] = lambda: subprocess.run(
            [scripts, f"--unix={server.path}", "--", "true"], env=ENVIRONMENT, check=True
        )
    times = alternate(count, **sides)
    show("python3 -I -S -c pass", times["bare"] * 1e3, "ms")
    for name in [name for name in times if name != "bare"]:
        show(
            f"vsh -- true, whole process, {name}",
            times[name] * 1e3,
            "ms",
            f"{times[name] / times['bare']:.1f} times bare",
        )
    show("  the launcher's less a warm Client.run()", (times["launcher"] - warm) * 1e3, "ms")


CHECKOUT = str(Path(__file__).resolve().parents[2])
LAUNCHER = [
    *(sys.executable, "-I", "-S", "-c"),
    f"import sys; sys.path.insert(0, {CHECKOUT!r}); from vsh.__main__ import main; sys.exit(main())",
]


def bench_bulk(server: Vshd, size: int, count: int) -> None:
    vsh = [*LAUNCHER, f"--unix={server.path}"]
    head = f"head -c {size} /dev/zero"

    def shell(command: str) -> None:
        subprocess.run(["sh", "-c", command], env=ENVIRONMENT, check=True)

    def quoted(*words: str) -> str:
        return " ".join("'" + word.replace("'", "'\\''") + "'" for word in (*vsh, *words))

    sides = {"cat | cat": partial(shell, f"{head} | cat | cat >/dev/null")}
    for mode in ("extended", "legacy"):
        flag = [] if mode == "extended" else ["--noextended"]
        sides[f"out, {mode}"] = partial(shell, f"{quoted(*flag, '--', *head.split())} >/dev/null")
        sides[f"in, {mode}"] = partial(shell, f"{head} | {quoted(*flag, '--', 'sh', '-c', 'cat >/dev/null')}")
    times = alternate(count, **sides)
    base = size / times["cat | cat"]
    for name, seconds in times.items():
        rate = size / seconds
        note = "" if name == "cat | cat" else f"{rate / base:.2f} of cat | cat"
        show(f"bulk {name}, {size >> 20} MiB", rate / 1e6, "MB/s", note)


def bench_round_trip(server: Vshd, size: int) -> None:
    """A file through cat and back, with equal hashes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise"
        block = os.urandom(1 << 20)
        sent = hashlib.sha256()
        with path.open("wb") as file:
            for number in range(size >> 20):
                piece = number.to_bytes(8, "little") + block[8:]
                sent.update(piece)
                file.write(piece)
        started = time.perf_counter()
        with path.open("rb") as file:
            done = subprocess.Popen(
                [*LAUNCHER, f"--unix={server.path}", "--", "cat"], env=ENVIRONMENT, stdin=file, stdout=subprocess.PIPE
            )
            assert isinstance(done.stdout, io.BufferedReader)
            received = hashlib.file_digest(done.stdout, "sha256")
        assert done.wait() == 0
        seconds = time.perf_counter() - started
        assert received.digest() == sent.digest()
        show(f"round trip through cat, {size >> 20} MiB, hashes equal", size / seconds / 1e6, "MB/s")


def bench_memory(server: Vshd, count: int) -> None:
    """Many sessions, one after another: the daemon's memory and descriptors before and after."""
    client = Client(Address.unix(str(server.path)))

    def measure() -> tuple[int, int]:
        text = Path(f"/proc/{server.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]), len(os.listdir(f"/proc/{server.pid}/fd"))

    for _ in range(50):
        client.run(["true"])
    before, files = measure()
    started = time.perf_counter()
    for _ in range(count):
        client.run(["true"])
    seconds = time.perf_counter() - started
    after, files_after = measure()
    show(
        f"vshd's memory after {count} sessions",
        after / 1024,
        "MiB",
        f"before: {before / 1024:.2f}, {after / before:.3f} times",
    )
    show("sessions in a row, each", seconds / count * 1e3, "ms", f"descriptors {files} -> {files_after}")


def bench_at_once(server: Vshd, count: int) -> None:
    """So many sessions that all run before the first one ends."""
    client = Client(Address.unix(str(server.path)))
    started = time.perf_counter()
    sessions = [client.open_session(["cat"]) for _ in range(count)]
    opened = time.perf_counter()
    for number, session in enumerate(sessions):
        text = b"%d" % number
        sink = CaptureSink(100)
        end = Pump(session, BytesSource(text), {messages.STDOUT: sink}).run()
        assert (end.code, sink.take()) == (0, text)
        session.close()
    seconds = time.perf_counter() - opened
    show(f"{count} sessions at once: to open them all", opened - started, "s", f"and {seconds:.2f} s to end them")


def main() -> None:
    quick = "--quick" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        server = Vshd(Path(folder), ["--spare_time=5"])
        try:
            times = bench_exec(server, 30 if quick else 200)
            bench_process(server, 7 if quick else 31, times["extended"])
            bench_bulk(server, GIB // 8 if quick else GIB, 3)
            bench_round_trip(server, GIB // 8 if quick else GIB)
            bench_at_once(server, 200)
            bench_memory(server, 200 if quick else 10_000)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
