"""Images for other architectures: their packages by apt in private state, and the programs that a build may run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.image.conftest import BASE_RECIPE, BUSYBOX, make_elf
from vmkit.errors import BuildError, ConfigError
from vmkit.image.build import build_image
from vmkit.image.cache import open_cache
from vmkit.image.debian.apt import UnknownPackageError
from vmkit.image.debian.lockfile import compare_locks, find_lock_path, read_lock_file, write_lock_file
from vmkit.image.debian.packages import TWINS, Lock, fetch, make_request, read_lock, resolve
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.formats.elf import is_elf, read_modinfo, read_needed
from vmkit.image.recipe.config import ImageSpec, load_image
from vmkit.image.twins import Twins

FakeSpec = Callable[..., ImageSpec]
VERSION = "6.12.1-s390x"
# What a program of s390x is not: a script that this host could run.
FOREIGN_BUSYBOX = make_elf(order=">", machine=22) + b"\0ls\0insmod\0"
RECIPE = BASE_RECIPE.replace("linux-image-cloud-amd64", "auto")


@pytest.fixture
def foreign(archive: Any, tmp_path: Path, make_deb: Callable[..., Path]) -> Any:
    """An archive with packages of s390x beside those of amd64."""
    copy = archive.copy(tmp_path / "archive")
    modules = f"usr/lib/modules/{VERSION}"
    info = {name: f"depends={needed}\0name={name}\0".encode() for name, needed in (("second", "first"), ("first", ""))}
    files = {
        f"{modules}/kernel/{name}.ko": make_elf(modinfo=text, order=">", machine=22) for name, text in info.items()
    }
    copy.add(
        make_deb("linux-image-s390x", architecture="s390x", fields=f"Depends: linux-image-{VERSION} (= 1.0-1)\n"),
        make_deb(
            f"linux-image-{VERSION}",
            {f"boot/vmlinux-{VERSION}": b"a kernel", f"{modules}/modules.builtin": b"", **files},
            architecture="s390x",
        ),
        make_deb("busybox-static", {"bin/busybox": FOREIGN_BUSYBOX}, architecture="s390x", executable=("bin/busybox",)),
        *(make_deb(name, {"usr/lib/x": b""}) for name in TWINS if name != "busybox-static"),
    )
    return copy


def _resolve(cache_dir: Path, spec: ImageSpec) -> Lock:
    with open_cache(cache_dir) as cache:
        return resolve(cache, make_request(spec), lambda _text, _part: None)


def test_packages_are_of_the_architecture_and_programs_that_run_are_of_the_hosts(
    cache_dir: Path, fake_spec: FakeSpec, foreign: Any
) -> None:
    spec = fake_spec(at=foreign, base=RECIPE, architecture="s390x")
    assert spec.kernel == "linux-image-s390x"
    lock = _resolve(cache_dir, spec)
    assert {record.architecture for record in lock.records} == {"s390x"}
    assert lock.kernel == f"linux-image-{VERSION}"
    assert [(record.name, record.architecture) for record in lock.twins] == [(name, "amd64") for name in sorted(TWINS)]
    with open_cache(cache_dir) as cache:
        assert read_lock(cache, make_request(spec)) == lock
        debs = fetch(cache, make_request(spec), lock, lambda _text, _part: None)
    assert debs["busybox-static"] != debs["busybox-static:amd64"]
    assert {"libc6:amd64", "zlib1g:amd64"} <= debs.keys() and "libc6" not in debs


def test_image_has_no_program_of_the_host(cache_dir: Path, fake_spec: FakeSpec, foreign: Any) -> None:
    built = build_image(fake_spec(at=foreign, base=RECIPE, architecture="s390x"))
    assert built.kernel.read_bytes() == b"a kernel"
    assert built.architecture == "s390x"
    manifest = json.loads(built.manifest.read_text())
    assert (manifest["architecture"], manifest["kernel_version"]) == ("s390x", VERSION)
    tree = {entry.path: entry.node for entry in read_cpio(built.initrd.read_bytes())}
    assert tree["usr/bin/busybox"].data == FOREIGN_BUSYBOX
    # Applets are those that its twin lists, and that it has itself.
    assert {"usr/bin/ls", "usr/sbin/insmod"} <= tree.keys() and "usr/bin/[" not in tree
    # The numbers in its modules begin with their highest byte.
    assert f"usr/lib/modules/{VERSION}/kernel/first.ko" in tree
    assert not any(BUSYBOX in node.data for node in tree.values())


def test_each_architecture_has_its_lock_and_its_image(cache_dir: Path, fake_spec: FakeSpec, foreign: Any) -> None:
    ours = fake_spec(at=foreign, base=RECIPE)
    theirs = fake_spec(at=foreign, base=RECIPE, architecture="s390x")
    assert ours.kernel == "linux-image-cloud-amd64"
    assert make_request(ours).key() != make_request(theirs).key()
    first, second = build_image(ours), build_image(theirs)
    assert first.digest != second.digest
    assert build_image(ours).cached and build_image(theirs).cached
    assert (find_lock_path(ours).name, find_lock_path(theirs).name) == ("my.lock", "my.s390x.lock")


def test_lock_file_has_the_twins(cache_dir: Path, fake_spec: FakeSpec, foreign: Any, tmp_path: Path) -> None:
    spec = fake_spec(at=foreign, base=RECIPE, architecture="s390x")
    lock = _resolve(cache_dir, spec)
    path = tmp_path / "my.s390x.lock"
    write_lock_file(path, make_request(spec), lock)
    assert read_lock_file(path, make_request(spec)) == lock
    fewer = Lock(lock.suite, lock.kernel, lock.kernel_suite, lock.python, lock.closure, lock.records)
    assert compare_locks(lock, fewer)[0] == "busybox-static:amd64: gone, was 1.0-1"
    shutil.rmtree(cache_dir)
    assert build_image(spec, lock_file=path, trust=True).architecture == "s390x"


def test_package_that_the_architecture_lacks_is_named(cache_dir: Path, fake_spec: FakeSpec, foreign: Any) -> None:
    spec = fake_spec('packages = ["tool"]\n', at=foreign, base=RECIPE, architecture="s390x")
    with pytest.raises(UnknownPackageError, match=r"no package 'tool' in stable \(main\) for s390x at"):
        _resolve(cache_dir, spec)


def test_image_that_runs_its_packages_programs_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot build the image debian for arm64: programs of its packages would"):
        load_image("debian", "arm64")
    assert load_image("debian").kernel == "linux-image-cloud-amd64"
    with pytest.raises(ConfigError, match="there is no architecture 'arm'"):
        load_image("tiny", "arm")


def test_tiny_is_the_same_recipe_with_the_paths_of_each_architecture() -> None:
    extract = dict(load_image("tiny", "arm64").extract)
    assert extract["zlib1g"] == ("usr/lib/aarch64-linux-gnu/libz.so.1*",)
    assert extract["libc6"][:2] == ("usr/lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu/ld*.so.*")
    assert dict(load_image("any").extract)["libc6"][0] == "usr/lib64/ld-linux-x86-64.so.2"


@pytest.mark.parametrize("order", ["<", ">"])
def test_elf_file_is_read_in_either_order_of_bytes(order: str) -> None:
    data = make_elf(modinfo=b"depends=a,b\0name=c\0", needed=(b"libz.so.1", b"libc.so.6"), order=order)
    assert is_elf(data)
    assert read_modinfo(data) == {"depends": ("a,b",), "name": ("c",)}
    assert read_needed(data) == ("libz.so.1", "libc.so.6")
    assert read_needed(data[:100]) == ()


def test_missing_twin_asks_for_new_versions(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the package lock does not hold busybox-static for amd64"):
        Twins({}, tmp_path).read_busybox()
