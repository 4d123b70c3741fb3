"""Children of the monitor: they die with it, inherit nothing, end within a deadline, and are quoted safely."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmkit.errors import HostError
from vmkit.monitor import child as child_module
from vmkit.monitor.child import Child, start_child
from vmkit.monitor.logs import CappedLog

DEADLINE_S = 20.0


async def run(folder: Path, *argv: str, fds: tuple[int, ...] = ()) -> Child:
    return await start_child("test", list(argv), log=CappedLog(folder / "log"), pass_fds=fds)


def end_of(folder: Path, *argv: str) -> Child:
    async def main() -> Child:
        child = await run(folder, *argv)
        async with asyncio.timeout(DEADLINE_S):
            await child.wait()
        return child

    return asyncio.run(main())


def test_output_is_logged_and_quoted(tmp_path: Path) -> None:
    child = end_of(tmp_path, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (tmp_path / "log").read_bytes() == b"out\nerr\n"
    assert child.render_tail() == "out\nerr"
    assert child.returncode == 3


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", "status 0"),
        ("exit 255", "status 255"),
        ("kill -9 $$", "signal 9 (SIGKILL)"),
        ("kill -40 $$", "signal 40"),
    ],
)
def test_end_is_told_in_words(tmp_path: Path, script: str, said: str) -> None:
    assert end_of(tmp_path, "sh", "-c", script).render_end().startswith(said)


def test_flood_of_output_costs_bounded_memory_and_disk(tmp_path: Path) -> None:
    child = end_of(tmp_path, sys.executable, "-c", "import os\nfor _ in range(300): os.write(1, b'x' * 65536)")
    assert len(child._recent) <= child_module.TAIL_BYTES
    assert len(child.render_tail()) < 1000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 4 * 1024 * 1024


def test_line_over_several_reads_is_one_line_and_harmless(tmp_path: Path) -> None:
    script = "printf 'ab\\303'; sleep 0.05; printf '\\244cd\\033]0;x\\007\\n'"
    assert end_of(tmp_path, "sh", "-c", script).render_tail() == "abäcd"


@pytest.mark.parametrize(("path", "said"), [("/nonexistent", "No such file or directory"), ("/", "Permission denied")])
def test_program_that_cannot_be_started_is_told(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(HostError, match=f"cannot start '{path}': {said}"):
        end_of(tmp_path, path)


def test_only_the_passed_descriptors_are_inherited(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    os.set_inheritable(read_fd, True)

    async def main() -> Child:
        script = f"import os; os.write({write_fd}, b'here'); print(*os.listdir('/proc/self/fd'))"
        child = await run(tmp_path, sys.executable, "-S", "-c", script, fds=(write_fd,))
        await child.wait()
        return child

    child = asyncio.run(main())
    # And the one that reads the folder.
    assert {"0", "1", "2", str(write_fd)} < set(child.render_tail().split())
    assert len(child.render_tail().split()) == 5
    assert os.read(read_fd, 10) == b"here"
    os.close(read_fd)
    os.close(write_fd)


def test_stop_asks_first(tmp_path: Path) -> None:
    async def main() -> Child:
        child = await run(tmp_path, "sh", "-c", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done")
        while not child._recent:
            await asyncio.sleep(0.01)
        await child.stop()
        await child.stop()
        return child

    child = asyncio.run(main())
    assert child.render_tail() == "up\nbye"
    assert child.returncode == 0


def test_stop_insists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "TERM_DEADLINE_S", 0.05)
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"

    async def main() -> Child:
        child = await run(tmp_path, sys.executable, "-c", script)
        while not child._recent:
            await asyncio.sleep(0.01)
        await child.stop()
        child.signal(signal.SIGTERM)
        return child

    assert asyncio.run(main()).returncode == -signal.SIGKILL


def test_output_held_open_by_a_grandchild_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "OUTPUT_DEADLINE_S", 0.05)

    async def main() -> float:
        started_s = time.monotonic()
        child = await run(tmp_path, "sh", "-c", "sleep 100 & echo $!; exit 0")
        await child.wait()
        took_s = time.monotonic() - started_s
        os.kill(int(child.render_tail()), signal.SIGKILL)
        await asyncio.wait([child._reader])
        return took_s

    assert asyncio.run(main()) < DEADLINE_S


def test_child_dies_with_its_parent_however_that_dies(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from vmkit.monitor.child import start_child\n"
        "from vmkit.monitor.logs import CappedLog\n"
        "async def main():\n"
        f"    log = CappedLog(Path({str(tmp_path / 'log')!r}))\n"
        "    c = await start_child('x', ['sleep', '100'], log=log, pass_fds=())\n"
        "    print(c.pid, flush=True)\n"
        "    time.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    end_s = time.monotonic() + DEADLINE_S
    while is_running(pid):
        assert time.monotonic() < end_s
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
