"""What goes wrong while files are copied: a clear error, the old file intact, and no temporary file left."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmkit.copy.conftest import Cp, Peers, find_temporary
from tests.vsh.live import wait_until
from tests.vshd.test_init import needs_namespace
from vmkit.copy import guest_source, host_source, tree
from vmkit.copy.copying import CopyError, copy
from vmkit.copy.endpoints import plan_copy
from vmkit.copy.engine import Step
from vmkit.copy.items import FileReader, FileWriter, Item, WholeReader
from vmkit.copy.wire import CHUNK_BYTES_MAX
from vmkit.errors import MachineError

ROOT = str(Path(__file__).resolve().parents[3])
DEADLINE_S = 60

# In a mount namespace: $1 is the file system's option, then a program.
MOUNT = 'mount -t tmpfs -o "$1" small small && shift && exec "$@"'
COPY = """
import sys
from pathlib import Path
from tests.vmkit.copy.conftest import Peers, find_temporary
from vmkit.copy.copying import copy
from vmkit.copy.endpoints import plan_copy
from vsh.errors import VshError
peers = Peers(Path("."))
sources, destination = plan_copy(sys.argv[1:])
try:
    copy(sources, destination, peers.connect)
except VshError as error:
    print(error.render("vmkit"))
peers.stop()
print(sorted(map(str, find_temporary(Path("small")))), Path("small/f").read_bytes()[:4])
"""


def copy_small(folder: Path, options: str, prepare: str, *words: str) -> list[str]:
    """Copies in a namespace in which `small` is a file system of its own. Returns the lines that it prints."""
    (folder / "small").mkdir()
    inner = f'{prepare}; exec "$@"'
    program = [sys.executable, "-c", COPY, *words]
    argv = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        MOUNT,
        "sh",
        options,
        "sh",
        "-c",
        inner,
        "sh",
    ]
    done = subprocess.run(
        [*argv, *program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_namespace
@pytest.mark.parametrize("words", [("f", "m:small/f"), ("m:f", "small/f"), ("m:f", "n:small/f")])
def test_full_destination_ends_the_copy(peers: Peers, host: Path, words: tuple[str, str]) -> None:
    (host / "f").write_bytes(b"new " * (1 << 20))
    lines = copy_small(host, "size=1m", "echo old > small/f", *words)
    assert lines == [f"vmkit: cannot write {words[1]}: No space left on device", "[] b'old\\n'"]


@needs_namespace
@pytest.mark.parametrize("words", [("f", "m:small/f"), ("m:f", "small/f")])
def test_read_only_destination_is_an_error(peers: Peers, host: Path, words: tuple[str, str]) -> None:
    (host / "f").write_bytes(b"new")
    lines = copy_small(host, "size=1m", "echo old > small/f; mount -o remount,ro small", *words)
    assert lines == [f"vmkit: cannot copy {words[0]}: Read-only file system", "[] b'old\\n'"]


@pytest.mark.parametrize("there", [("f", "m:"), ("m:f", ".")])
def test_file_onto_a_directory_is_an_error(cp: Cp, host: Path, guest: Path, there: tuple[str, str]) -> None:
    source, target = (host, guest) if there[1] == "m:" else (guest, host)
    (source / "f").write_text("file")
    (target / "f").mkdir()
    with pytest.raises(CopyError, match="Is a directory"):
        cp(*there)
    assert (target / "f").is_dir()


@pytest.mark.parametrize("there", [("d", "m:"), ("m:d", "."), ("d", "m:d")])
def test_directory_onto_a_file_is_an_error(cp: Cp, host: Path, guest: Path, there: tuple[str, str]) -> None:
    source, target = (guest, host) if there[1] == "." else (host, guest)
    (source / "d").mkdir()
    (source / "d" / "x").write_text("x")
    (target / "d").write_text("kept")
    with pytest.raises(CopyError, match="has this name"):
        cp(*there)
    assert (target / "d").read_text() == "kept"


def test_place_below_a_file_is_an_error(cp: Cp, host: Path, guest: Path) -> None:
    (guest / "f").write_text("x")
    (host / "f").write_text("x")
    with pytest.raises(MachineError, match="m:f is not"):
        cp("f", "m:f/x")
    with pytest.raises(MachineError, match="f: Not a directory"):
        cp("m:f", "f/x")


def test_file_onto_itself_is_an_error(cp: Cp, guest: Path) -> None:
    (guest / "f").write_text("kept")
    (guest / "d" / "e").mkdir(parents=True)
    (guest / "l").symlink_to("d")
    for words in (("m:f", "m:f"), ("m:f", "m:"), ("m:d/../f", "m:l/../f")):
        with pytest.raises(CopyError, match="are the same file"):
            cp(*words)
    for words in (("m:d", "m:d/e"), ("m:d", "m:l/new"), ("m:.", "m:d")):
        with pytest.raises(CopyError, match=r"is inside the source|are the same"):
            cp(*words)
    assert (guest / "f").read_text() == "kept"


def test_two_sources_of_one_name_are_an_error(cp: Cp, host: Path, guest: Path) -> None:
    for name in ("a", "b"):
        (host / name).mkdir()
        (host / name / "f").write_text(name)
    with pytest.raises(CopyError, match="cannot copy b/f: another source has the same name"):
        cp("a/f", "b/f", "m:")
    assert (guest / "f").read_text() == "a"


def test_failures_are_counted_and_the_rest_is_copied(cp: Cp, host: Path, guest: Path) -> None:
    (guest / "t").mkdir()
    (host / "t").mkdir()
    for number in range(30):
        (guest / "t" / f"{number:02}").write_text("new")
        (host / "t" / f"{number:02}").mkdir() if number < 20 else None
    with pytest.raises(CopyError, match="20 files were not copied") as caught:
        cp("m:t", ".")
    assert (caught.value.failed, caught.value.copied.files) == (20, 10)
    assert caught.value.details.splitlines()[0] == "m:t/00: Is a directory"
    assert caught.value.details.splitlines()[-1] == "and 10 more"


def test_special_file_by_its_name_is_an_error(cp: Cp, host: Path, guest: Path) -> None:
    os.mkfifo(guest / "fifo")
    os.mkfifo(host / "fifo")
    for words in (("m:fifo", "x"), ("fifo", "m:x"), ("m:/dev/null", "x")):
        with pytest.raises(CopyError, match="it is a device, a socket or a FIFO"):
            cp(*words)


def test_directory_to_standard_output_is_an_error(cp: Cp, guest: Path) -> None:
    (guest / "d").mkdir()
    with pytest.raises(CopyError, match="cannot go to standard output"):
        cp("m:d", "-")


# What changes between the moment that the copy sees a file, and its end


@pytest.fixture
def before_open(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """before_open(do): `do` runs when a file of either side was seen, and is about to be opened."""

    def arrange(do: Callable[[], object]) -> None:
        host_open, guest_open = host_source.HostFolder.open_reader, guest_source.GuestFolder.open_reader

        def open_host(
            self: host_source.HostFolder, name: bytes, item: Item, chunk_bytes: int
        ) -> Step[host_source.HostReader | WholeReader]:
            do()
            return host_open(self, name, item, chunk_bytes)

        def open_guest(
            self: guest_source.GuestFolder, name: bytes, item: Item, chunk_bytes: int
        ) -> Step[guest_source.GuestReader | WholeReader]:
            do()
            return guest_open(self, name, item, chunk_bytes)

        monkeypatch.setattr(host_source.HostFolder, "open_reader", open_host)
        monkeypatch.setattr(guest_source.GuestFolder, "open_reader", open_guest)

    return arrange


@pytest.mark.parametrize("words", [("f", "m:"), ("m:f", "."), ("m:f", "m:other")])
def test_source_that_vanishes_is_an_error(
    cp: Cp, host: Path, guest: Path, before_open: Callable[[Callable[[], object]], None], words: tuple[str, str]
) -> None:
    source = host if words[0] == "f" else guest
    (source / "f").write_text("x")
    before_open((source / "f").unlink)
    with pytest.raises(CopyError, match="f: No such file or directory"):
        cp(*words)


@pytest.mark.parametrize("words", [("f", "m:"), ("m:f", ".")])
@pytest.mark.parametrize("size", [0, 3 * CHUNK_BYTES_MAX + 5, 20 * CHUNK_BYTES_MAX])
def test_file_that_changes_while_it_is_read_is_an_error(
    cp: Cp, host: Path, guest: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], size: int
) -> None:
    """It shrinks to `size`, or grows to it, once it is open."""
    source, target = (host, guest) if words[0] == "f" else (guest, host)
    (source / "f").write_bytes(b"1" * (10 * CHUNK_BYTES_MAX))
    (target / "f").write_text("old")
    pump = tree.pump

    def change(reader: FileReader, writer: FileWriter, tally: tree.Tally) -> Step[None]:
        os.truncate(source / "f", size)
        return pump(reader, writer, tally)

    monkeypatch.setattr(tree, "pump", change)
    with pytest.raises(CopyError, match="f: it changed while vmkit read it"):
        cp(*words)
    assert (target / "f").read_text() == "old"


def test_small_file_that_grew_since_the_listing_is_copied_whole(
    cp: Cp, host: Path, guest: Path, before_open: Callable[[Callable[[], object]], None]
) -> None:
    (guest / "f").write_text("x")
    before_open(lambda: (guest / "f").write_text("longer"))
    cp("m:f", ".")
    assert (host / "f").read_text() == "longer"


def test_names_that_no_terminal_should_get_are_copied(cp: Cp, host: Path, guest: Path) -> None:
    names = [b"new\nline", b"\x1b[2J", b"\xff\xfe", b"-rf", b" ", b"a:b", "\N{SNOWMAN}".encode(), b"x" * 255]
    (host / "t").mkdir()
    for name in names:
        (host / "t" / os.fsdecode(name)).write_bytes(name)
    cp("t", "m:")
    cp("m:t", "back")
    assert sorted(os.listdir(os.fsencode(host / "back"))) == sorted(names)


# Ends in the middle


def start_program(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """A copy as a program that ends on SIGINT as vmkit does, and prints a server's pid."""
    code = "import signal, sys; from tests.vmkit.copy.test_faults import run_program; run_program(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_program(*words: str) -> None:
    """The program of start_program."""
    peers = Peers(Path.cwd())
    sources, destination = plan_copy(words)
    try:
        copy(sources, destination, peers.connect)
    except KeyboardInterrupt:
        sys.exit(130)
    except MachineError as error:
        print(error.brief)
        sys.exit(1)


@pytest.mark.parametrize("words", [("big", "m:new"), ("m:big", "new"), ("m:big", "n:new")])
def test_interrupted_copy_leaves_nothing(peers: Peers, host: Path, words: tuple[str, str]) -> None:
    with (host / "big").open("wb") as file:
        for _ in range(64):
            file.write(b"\1" * (4 << 20))
    (host / "new").write_text("old")
    program = start_program(host, *words)
    wait_until(lambda: find_temporary(host), "the copy has begun")
    program.send_signal(signal.SIGINT)
    assert program.wait(DEADLINE_S) == 130, program.communicate()
    assert find_temporary(host) == []
    assert (host / "new").read_text() == "old"
    program.communicate()


@pytest.mark.parametrize("words", [("big", "m:new"), ("m:big", "new")])
def test_server_killed_in_the_middle_is_an_error(
    cp: Cp, peers: Peers, host: Path, guest: Path, words: tuple[str, str]
) -> None:
    source, target = (host, guest) if words[0] == "big" else (guest, host)
    with (source / "big").open("wb") as file:
        for _ in range(64):
            file.write(b"\1" * (4 << 20))
    (target / "new").write_text("old")

    def kill() -> None:
        wait_until(lambda: find_temporary(target), "the copy has begun")
        peers.processes[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(MachineError, match="the connection to 'm' ended before the copy did"):
        cp(*words)
    killer.join()
    assert (target / "new").read_text() == "old"
    # A server that is dead removes nothing in the guest.
    for path in find_temporary(guest):
        path.unlink()
