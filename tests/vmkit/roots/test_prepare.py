"""From a SOURCE to a disk, whole: made once, the same content in every form, and nothing left behind by a fault."""

import gc
import gzip
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vmkit.roots.archives import (
    SHELL,
    folder,
    link,
    list_ext4,
    make_layout,
    make_tar,
    make_umoci_layout,
    member,
    read_ext4,
)
from tests.vmkit.roots.disks import MIB, make_disk, make_file_system, run
from tests.vmkit.roots.registry import serve, serve_engine
from tests.vshd.test_init import needs_namespace
from vmkit.errors import BuildError, ConfigError, HostError
from vmkit.roots.limits import RootLimits
from vmkit.roots.prepare import PreparedRoot, prepare_root
from vmkit.roots.superblocks import FileSystemKind

ROOT = make_tar(
    [("bin/sh", SHELL), ("etc/passwd", b"root:x:0:0::/:/bin/sh\n"), link("bin/ash", "bin/sh", tarfile.LNKTYPE)]
)


@pytest.fixture(scope="module")
def umoci(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umoci")
    return make_umoci_layout(folder / "layout", folder / "work")


@pytest.fixture(autouse=True)
def _leaves_nothing(cache_dir: Path) -> Iterator[None]:
    """Whatever happened: no unfinished thing, and no root that is not whole."""
    with nothing_left_open():
        yield
        # The Docker SDK leaves the socket of a failed connection to the collector.
        gc.collect()
    assert list((cache_dir / "tmp").iterdir() if (cache_dir / "tmp").exists() else []) == []
    for path in (cache_dir / "roots").iterdir() if (cache_dir / "roots").exists() else []:
        assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "root"]


# Each form


def test_image_of_umoci_becomes_a_disk_with_what_its_layers_give(umoci: Path) -> None:
    one, two = prepare_root(f"oci:{umoci}:one"), prepare_root(f"oci:{umoci}:two")
    assert one.settings.user == "5:6"
    assert (one.disk_format, one.file_system, one.partition) == ("raw", FileSystemKind.EXT4, None)
    found = list_ext4(one.path)
    assert found["/bin/sh"] == found["/bin/ash"] == f"104755 0:0 {len(SHELL)}"
    assert {"/etc/gone", "/srv/old", "/srv/old/a", "/srv/old/b"} <= found.keys()
    found = list_ext4(two.path)
    assert {"/etc/gone", "/srv/old/a", "/srv/old/b"}.isdisjoint(found)
    assert found["/srv/new"].startswith("040755")
    assert read_ext4(two.path, "/srv/old") == b"now a file"


def test_forms_of_one_image_are_one_disk(umoci: Path, tmp_path: Path) -> None:
    first = prepare_root(f"oci:{umoci}:one")
    assert not first.cached
    run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{umoci}:one", f"docker-archive:{tmp_path}/a.tar:me/x:1")
    run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{umoci}:one", f"oci-archive:{tmp_path}/b.tar")
    run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{umoci}:one", f"oci:{tmp_path}/layout:one")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    sources = [
        f"docker-archive:{tmp_path}/a.tar:me/x:1",
        f"{tmp_path}/a.tar",
        f"{tmp_path}/b.tar",
        f"oci-archive:{tmp_path}/b.tar",
        f"{tmp_path}/c.tar.gz",
        f"{tmp_path}/layout",
    ]
    assert [prepare_root(source) for source in sources] == [replace(first, cached=True)] * len(sources)


def test_forms_of_one_tar_are_one_disk(tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(ROOT)
    first = prepare_root(f"{tmp_path}/root.tar")
    found = list_ext4(first.path)
    assert found["/bin/ash"] == found["/bin/sh"] == f"100644 0:0 {len(SHELL)}"
    (tmp_path / "root.tar.gz").write_bytes(gzip.compress(ROOT))
    (tmp_path / "root.tar.xz").write_bytes(lzma.compress(ROOT))
    run("zstd", "-q", tmp_path / "root.tar")
    for suffix in ("gz", "xz", "zst"):
        assert prepare_root(f"{tmp_path}/root.tar.{suffix}") == replace(first, cached=True)


@pytest.mark.parametrize("content", ["root", "image"])
def test_archive_is_unpacked_once_while_it_is_the_same_file(umoci: Path, tmp_path: Path, content: str) -> None:
    run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{umoci}:one", f"docker-archive:{tmp_path}/a.tar:me/x:1")
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(gzip.compress(ROOT if content == "root" else (tmp_path / "a.tar").read_bytes()))
    told: list[str] = []

    def prepare() -> PreparedRoot:
        told.clear()
        return prepare_root(str(path), progress=lambda text, _: told.append(text))

    first = prepare()
    assert told[0] == f"reading {path}"
    assert prepare() == replace(first, cached=True)
    assert told == []
    # Another content is another root, and a root that is gone is made again.
    path.write_bytes(gzip.compress(make_tar([("bin/sh", SHELL * 2)])))
    second = prepare()
    assert second.key != first.key
    shutil.rmtree(second.path.parent)
    assert prepare() == second


def test_folder_is_packed_anew_after_a_change_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/sh").write_bytes(SHELL)
    first = prepare_root(str(root))
    assert (first.cached, prepare_root(str(root)).cached) == (False, True)
    (root / "bin/sh").write_bytes(SHELL * 2)
    second = prepare_root(str(root))
    assert second.key != first.key
    assert read_ext4(second.path, "/bin/sh") == SHELL * 2


@pytest.mark.parametrize("form", ["-", "fifo"])
def test_stream_is_read_once(umoci: Path, tmp_path: Path, form: str) -> None:
    run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{umoci}:one", f"docker-archive:{tmp_path}/a.tar:me/x:1")
    data = (tmp_path / "a.tar").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(data), daemon=True)
    writer.start()
    if form == "fifo":
        found = prepare_root(str(tmp_path / "pipe"))
    else:
        with (tmp_path / "pipe").open("rb") as pipe:
            found = prepare_root("-", stdin=pipe.fileno())
    writer.join()
    assert found.key == prepare_root(f"oci:{umoci}:one").key


def test_disk_is_used_where_it_is(tmp_path: Path, cache_dir: Path) -> None:
    ext4 = make_file_system("ext4", tmp_path / "ext4")
    raw = make_disk(tmp_path / "disk.raw", "label: gpt\nstart=1MiB, size=8MiB, type=linux\n", {1: ext4})
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, tmp_path / "any.name")
    assert prepare_root(str(ext4)) == PreparedRoot(ext4, "raw", FileSystemKind.EXT4)
    for path, disk_format in ((raw, "raw"), (tmp_path / "any.name", "qcow2")):
        found = prepare_root(str(path))
        assert (found.path, found.disk_format, found.cached) == (path, disk_format, False)
        assert found.partition is not None
        assert (found.partition.number, found.partition.offset_bytes) == (1, MIB)
        with pytest.raises(ConfigError, match="has no partition 2"):
            prepare_root(str(path), partition=2)
    assert not (cache_dir / "roots").exists()


def test_disk_on_a_chain_of_files_needs_each_to_be_named(tmp_path: Path) -> None:
    raw = make_file_system("ext4", tmp_path / "raw")
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", raw, tmp_path / "middle")
    run("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", tmp_path / "middle", tmp_path / "top")
    with pytest.raises(ConfigError, match=f"needs the backing file {tmp_path}/middle, which you have not named"):
        prepare_root(f"{tmp_path}/top")
    with pytest.raises(ConfigError, match=f"{tmp_path}/middle needs the backing file {raw}"):
        prepare_root(f"{tmp_path}/top", named=(tmp_path / "middle",))
    found = prepare_root(f"{tmp_path}/top", named=(tmp_path / "middle", raw))
    assert (found.disk_format, found.others) == ("qcow2", (tmp_path / "middle", raw))
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", tmp_path / "top", tmp_path / "middle")
    with pytest.raises(BuildError, match="a chain of more than 16 qcow2 files"):
        prepare_root(f"{tmp_path}/top", named=(tmp_path / "middle", tmp_path / "top"))


# What cannot be a root


@pytest.mark.parametrize(
    ("name", "data", "seen"),
    [
        ("missing", None, "there is no file"),
        ("empty", b"", "is empty"),
        ("text", b"hello\n" * 1000, "vmkit cannot tell what .* is"),
        ("packed.gz", gzip.compress(b"hello\n" * 1000, mtime=0), "holds text, and vmkit expects a tar"),
        ("disk.gz", gzip.compress(bytes(4096), mtime=0), "holds a disk, and vmkit expects a tar"),
        ("no-files.tar", make_tar([folder("./")]), "holds no files"),
        ("bad.tar", make_tar([("/etc/passwd", b"x")]), "holds the absolute name '/etc/passwd'"),
        (
            "arm.tar",
            make_tar([("bin/sh", b"\x7fELF\x02\x01" + bytes(12) + b"\xb7\0" + bytes(40))]),
            "is made for arm64",
        ),
        ("cut.tar", ROOT[:1500], "is damaged: it ends"),
    ],
)
def test_source_that_is_no_root_says_why_and_what_to_do(
    tmp_path: Path, cache_dir: Path, name: str, data: bytes | None, seen: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises((BuildError, ConfigError), match=seen) as caught:
        prepare_root(str(tmp_path / name))
    assert caught.value.hint
    assert not (cache_dir / "roots").exists()


def test_words_that_fit_no_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(ROOT)
    with pytest.raises(ConfigError, match="'tiny' is the name of an image"):
        prepare_root("tiny")
    with pytest.raises(ConfigError, match="has no partitions"):
        prepare_root(f"{tmp_path}/root.tar", partition=1)
    with pytest.raises(ConfigError, match="is no container image: it has neither"):
        prepare_root(f"oci:{tmp_path}/root.tar")
    with pytest.raises(ConfigError, match="is no file, folder or disk"):
        prepare_root("/dev/null")


def test_terminal_is_no_archive() -> None:
    leader, follower = os.openpty()
    try:
        with pytest.raises(ConfigError, match="standard input is a terminal"):
            prepare_root("-", stdin=follower)
    finally:
        os.close(leader)
        os.close(follower)


@pytest.mark.parametrize("layer", [0, 1])
def test_layer_that_is_not_the_one_of_its_digest_is_refused(tmp_path: Path, cache_dir: Path, layer: int) -> None:
    layers = [make_tar([(f"file{number}", b"x" * 2000)]) for number in range(2)]
    layout = make_layout(tmp_path / "layout", layers)
    for blob in (layout / "blobs/sha256").iterdir():
        if blob.read_bytes() == layers[layer]:
            blob.write_bytes(layers[layer].replace(b"x" * 2000, b"y" * 2000))
    with pytest.raises(BuildError, match=r"the layer sha256:.* does not match its digest"):
        prepare_root(f"oci:{layout}")
    assert not (cache_dir / "roots").exists()


def test_bomb_in_a_layer_ends_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(make_tar([("zeros", bytes(32 << 20))])))
    with pytest.raises(BuildError, match="the root is larger than 4 MiB when it is unpacked"):
        prepare_root(f"{tmp_path}/bomb.tar.gz", limits=RootLimits(size_bytes=4 << 20))


def test_file_outside_of_the_cache_is_never_made(tmp_path: Path) -> None:
    """Names, links, whiteouts and devices that aim at the host."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_bytes(b"host")
    layers = [
        make_tar([link("abs", str(target)), link("up", "../" * 30 + str(target)[1:])]),
        make_tar([("abs/file", b"guest"), ("up/new", b"guest"), ("abs/.wh.file", b"")]),
        make_tar(
            [member("abs/mem", tarfile.CHRTYPE, devmajor=1, devminor=1), link("abs/hard", "abs/file", tarfile.LNKTYPE)]
        ),
    ]
    found = list_ext4(prepare_root(f"oci:{make_layout(tmp_path / 'layout', layers)}").path)
    assert {f"{target}/{name}" for name in ("file", "new", "mem", "hard")} <= found.keys()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_bytes() == b"host"


# Faults


def test_damaged_disk_in_the_cache_is_packed_again(tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(ROOT)
    first = prepare_root(f"{tmp_path}/root.tar")
    good = first.path.read_bytes()
    with first.path.open("r+b") as file:
        file.write(b"junk")
    again = prepare_root(f"{tmp_path}/root.tar")
    assert (again.cached, again.path.read_bytes()) == (False, good)


def test_two_who_want_one_root_pack_it_once(tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(ROOT)
    found: list[PreparedRoot] = []
    threads = [threading.Thread(target=lambda: found.append(prepare_root(f"{tmp_path}/root.tar"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.cached for one in found) == [False, True, True, True]


def test_full_disk_is_told_and_leaves_nothing(tmp_path: Path, cache_dir: Path) -> None:
    """A limit on the size of files stands for it: the same answer, without a file system of its own."""
    (tmp_path / "root.tar").write_bytes(make_tar([("noise", os.urandom(6 << 20))]))
    code = (
        "import resource, signal\n"
        "from vmkit.roots.prepare import prepare_root\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))\n"
        f"prepare_root('{tmp_path}/root.tar')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "BuildError: a file would be too large while writing to" in done.stderr
    assert not (cache_dir / "roots").exists()


FULL_DISK = """
import sys
from pathlib import Path
from vmkit.errors import BuildError
from vmkit.roots.prepare import prepare_root
try:
    prepare_root(sys.argv[1])
except BuildError as error:
    print(error.brief)
print([str(path) for path in Path(sys.argv[2]).rglob("*") if path.is_file() and path.parent.name != "flock"])
"""
MOUNT = 'mount -t tmpfs -o mode=700,size="$0" none "$VMKIT_CACHE_DIR" && exec "$@"'


@needs_namespace
@pytest.mark.parametrize("size", ["3m", "9m", "16m"])
def test_disk_that_becomes_full_is_told_at_every_step(tmp_path: Path, cache_dir: Path, size: str) -> None:
    """While it is unpacked, while contents are written, and while debugfs writes them once more."""
    (tmp_path / "root.tar.gz").write_bytes(gzip.compress(make_tar([("noise", os.urandom(6 << 20))]), 1))
    cache_dir.mkdir(mode=0o700)
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, size]
    argv += [sys.executable, "-c", FULL_DISK, f"{tmp_path}/root.tar.gz", str(cache_dir)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=True)
    brief, files = done.stdout.splitlines()
    assert brief.startswith("the disk is full while writing to"), done.stdout + done.stderr
    assert files == "[]"


def test_program_that_is_told_to_end_leaves_nothing(tmp_path: Path, cache_dir: Path) -> None:
    """A stream that does not end: SIGTERM comes in the middle of it, as to vmkit, where it unwinds."""
    code = (
        "import signal, sys\n"
        "from vmkit.roots.prepare import prepare_root\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "prepare_root('-', progress=lambda text, _: print(text, flush=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(ROOT[:1000])
        child.stdin.flush()
        assert child.stdout.readline() == b"reading standard input\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 143
    assert not (cache_dir / "roots").exists()


def test_cache_in_the_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the cache folder is inside of"):
        prepare_root(str(tmp_path))


def test_registry_is_asked_for_no_layer_that_the_cache_has(umoci: Path) -> None:
    with serve(umoci, "one") as registry:
        first = prepare_root(f"docker://{registry.address}/me/mine:one")
        layers = prepare_root(f"oci:{umoci}:one")
        assert (first.cached, first.settings) == (False, layers.settings)
        assert layers == replace(first, cached=True)
        fetched = list(registry.fetched)
        assert len(set(fetched)) == 2
        assert prepare_root(f"docker://{registry.address}/me/mine:one") == layers
        # The configuration alone.
        assert len(set(registry.fetched[len(fetched) :])) == 1
        with pytest.raises(HostError, match=f"the registry {registry.address} has no image"):
            prepare_root(f"docker://{registry.address}/me/mine:two")


@pytest.mark.parametrize("is_pulled", [True, False])
def test_engine_saves_the_image_where_there_is_no_skopeo(
    umoci: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_pulled: bool
) -> None:
    pytest.importorskip("docker")
    first = prepare_root(f"oci:{umoci}:one")
    run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{umoci}:one", f"docker-archive:{tmp_path}/a.tar:me/x:latest")
    data = (tmp_path / "a.tar").read_bytes()
    # A UNIX socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="vmkit-") as name:
        socket = Path(name) / "s"
        monkeypatch.setenv("DOCKER_HOST", f"unix://{socket}")
        monkeypatch.setenv("PATH", "/nowhere")
        with serve_engine(socket, data, "me/x:latest", is_pulled=is_pulled) as asked:
            assert prepare_root("docker://me/x") == replace(first, cached=True)
            pulled = [path for path in asked if path.startswith("/create")]
            assert pulled == ([] if is_pulled else ["/create?tag=latest&fromImage=me/x&platform=linux/amd64"])
            with pytest.raises(HostError, match="the Docker engine cannot give the image other:1"):
                prepare_root("docker://other:1")


def test_registry_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(HostError, match="no registry answers at localhost:1: the connection is refused") as caught:
        prepare_root("docker://localhost:1/none:1")
    assert "connection refused" in caught.value.details
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match=r"there is no skopeo, and (no Docker engine|the Docker SDK)") as caught:
        prepare_root("docker://localhost:1/none:1")
    assert caught.value.hint == "install it: sudo apt-get install skopeo"


def test_directory_of_the_image_is_made_where_no_layer_has_it(tmp_path: Path) -> None:
    """As engines do when a container begins. It is part of the disk, and so of its key."""

    def pack(name: str, folder: str) -> PreparedRoot:
        return prepare_root(f"oci:{make_layout(tmp_path / name, [ROOT], {'config': {'WorkingDir': folder}})}")

    plain, made = pack("plain", "/"), pack("made", "/srv/app")
    assert "/srv" not in list_ext4(plain.path)
    assert list_ext4(made.path)["/srv/app"] == "040755 0:0"
    assert pack("again", "srv/app/").path == made.path
    assert pack("none", "").path == plain.path
    # What stands in the way, or leads out, stays as it is.
    for name, odd in (("file", "/bin/sh/x"), ("there", "/etc"), ("out", "/../x")):
        assert set(list_ext4(pack(name, odd).path)) == set(list_ext4(plain.path))
