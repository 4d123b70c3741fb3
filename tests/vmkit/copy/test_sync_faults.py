"""A sync that fails leaves the old files, no temporary file, and nothing outside the destination."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vmkit.copy.conftest import Peers, find_temporary
from tests.vmkit.copy.test_faults import DEADLINE_S, MOUNT, ROOT
from tests.vmkit.copy.test_lies import names_below, tell
from tests.vmkit.copy.test_sync import fill
from tests.vsh.live import wait_until
from tests.vshd.test_init import needs_namespace
from vmkit.copy.endpoints import plan_sync
from vmkit.copy.sync_tree import Rules
from vmkit.copy.syncing import sync
from vmkit.copy.wire import SftpError
from vsh.errors import VshError

SYNC = "import sys; from tests.vmkit.copy.test_sync_faults import run_program; run_program(*sys.argv[1:])"


def run_program(*words: str) -> None:
    """A sync as a program that ends on SIGINT as vmkit does."""
    peers = Peers(Path.cwd())
    try:
        sync(*plan_sync(words), peers.connect, rules=Rules(delete=True))
    except KeyboardInterrupt:
        sys.exit(130)
    except VshError as error:
        print(error.render("vmkit"))
    peers.stop()


@needs_namespace
@pytest.mark.parametrize("words", [("src", "m:small"), ("m:src", "small")])
@pytest.mark.parametrize(
    ("prepare", "errors"),
    [
        (":", {"vmkit: cannot write {sink}/f: No space left on device"}),
        # Either the file cannot be written, or its old neighbour cannot be deleted: both are told.
        ("mount -o remount,ro small", {"vmkit: 2 files were not synced"}),
    ],
)
def test_destination_that_takes_nothing_keeps_its_files(
    peers: Peers, host: Path, words: tuple[str, str], prepare: str, errors: set[str]
) -> None:
    (host / "small").mkdir()
    fill(host / "src", {"f": "new " * (1 << 20)})
    inner = f'echo old > small/f; echo old > small/g; {prepare}; "$@"; ls -A small; cat small/f'
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", "size=1m", "sh", "-c", inner]
    done = subprocess.run(
        [*argv, "sh", sys.executable, "-c", SYNC, *words],
        cwd=host,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] in {error.format(sink=words[1]) for error in errors}, done.stdout
    # g may have been deleted before f was too much.
    assert set(lines[-3:]) <= {"f", "g", "old", lines[0]}
    assert lines[-1] == "old"


@pytest.mark.parametrize("words", [("src", "m:dst"), ("m:src", "dst")])
def test_interrupted_sync_leaves_nothing(peers: Peers, host: Path, words: tuple[str, str]) -> None:
    fill(host, {"src/small": "new", "dst/big": "old"})
    with (host / "src/big").open("wb") as file:
        for _ in range(64):
            file.write(b"\1" * (4 << 20))
    program = subprocess.Popen(
        [sys.executable, "-c", SYNC, *words], cwd=host, env={**os.environ, "PYTHONPATH": ROOT}, stderr=subprocess.PIPE
    )
    wait_until(lambda: find_temporary(host), "the sync has begun")
    program.send_signal(signal.SIGINT)
    assert program.wait(DEADLINE_S) == 130, program.communicate()
    program.communicate()
    assert find_temporary(host) == []
    assert (host / "dst/big").read_text() == "old"


@pytest.mark.parametrize("word", ["slash", "inner-slash", "nul", "empty", "twice", "no-names", "count", "huge"])
@pytest.mark.parametrize("words", [("m:t", "t"), ("t", "m:t")])
def test_lie_ends_the_sync(peers: Peers, host: Path, word: str, words: tuple[str, str]) -> None:
    tell(peers, word)
    fill(host, {"t/f": "old", "t/g": "old"})
    with pytest.raises(SftpError):
        sync(*plan_sync(words), peers.connect, rules=Rules(delete=True))
    assert names_below(host) >= {"t", "t/f", "t/g"}
    assert names_below(host) <= {"t", "t/f", "t/g", "t/l"}
    assert names_below(host.parent) == {"host", "guest"} | {f"host/{name}" for name in names_below(host)}
