"""The archive with a kernel's modules, and the initramfs that it stands behind."""

import os
import struct
import time
from pathlib import Path

import pytest

from tests.vmkit.trees.trees import VERSION, MakeTree, add_section, make_bzimage, make_module, write_file
from vmkit.errors import BuildError, ConfigError
from vmkit.image.cache import INITRD_BUSY_S, Cache
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.formats.elf import drop_debug, read_modinfo, read_section
from vmkit.trees import initrd
from vmkit.trees.config import find_needs
from vmkit.trees.files import find_installed, find_tree
from vmkit.trees.initrd import LIST_PATH, ModuleFile, extend_initrd, has_root, plan_modules

ROOT = f"usr/lib/modules/{VERSION}"
TINYS = ("virtio_pci", "vsock", "vmw_vsock_virtio_transport")


def read_files(archive: bytes) -> dict[str, bytes]:
    return {entry.path: entry.node.data for entry in read_cpio(archive)}


def test_archive_has_what_the_machine_loads_and_no_more(make_tree: MakeTree) -> None:
    files = read_files(plan_modules(find_tree(make_tree()), find_needs(), TINYS, ("virtio_blk", "no_such")))
    names = {Path(path).name for path in files if path.endswith(".ko")}
    # virtio_pci is built in.
    assert names == {
        *("vsock.ko", "vmw_vsock_virtio_transport_common.ko", "vmw_vsock_virtio_transport.ko", "virtio_blk.ko")
    }
    order = files[LIST_PATH].split()
    assert order == [b"vsock", b"vmw_vsock_virtio_transport_common", b"vmw_vsock_virtio_transport"]
    dependencies = files[f"{ROOT}/modules.dep"].decode()
    assert "kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko: kernel/net/vmw_vsock/vmw_vsock_virtio" in dependencies
    assert b"virtio_pci.ko" in files[f"{ROOT}/modules.builtin"]


def test_root_brings_its_modules(make_tree: MakeTree) -> None:
    files = read_files(plan_modules(find_tree(make_tree()), find_needs(root="ext4"), TINYS))
    assert {"ext4.ko", "jbd2.ko", "overlay.ko", "virtio_blk.ko"} <= {Path(path).name for path in files}


def test_module_that_is_configured_and_not_built_is_named(make_tree: MakeTree) -> None:
    tree = make_tree()
    (tree / "modules.order").unlink()
    with pytest.raises(ConfigError, match=f"the kernel {VERSION} has no module 'vsock'") as caught:
        plan_modules(find_tree(tree), find_needs(), TINYS)
    assert caught.value.hint == "build the modules: make -j$(nproc) modules"
    tree = make_tree()
    (tree / "net/vmw_vsock/vsock.ko").unlink()
    with pytest.raises(BuildError, match=r"cannot read the module .*/vsock.ko: No such file") as gone:
        plan_modules(find_tree(tree), find_needs(), TINYS)
    assert "make" in gone.value.hint
    with pytest.raises(ConfigError, match="no module 'odd'") as odd:
        plan_modules(find_tree(make_tree()), find_needs(), ("odd",))
    assert "leave odd out of the image's recipe" in odd.value.hint


def test_folder_of_modules_without_vsock_is_told_the_option(tmp_path: Path) -> None:
    folder = tmp_path / VERSION
    write_file(folder / "kernel/a.ko", make_module(""))
    write_file(folder / "modules.builtin", "kernel/drivers/virtio/virtio_pci.ko\n")
    write_file(tmp_path / "kernel", make_bzimage())
    with pytest.raises(ConfigError, match="no module 'vsock'") as caught:
        plan_modules(find_installed(folder, tmp_path / "kernel"), find_needs(), TINYS)
    assert caught.value.details == "CONFIG_VSOCKETS=y"


def test_initramfs_is_extended_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "cache"))
    first = tmp_path / "initrd"
    first.write_bytes(b"first")
    made = extend_initrd(first, "digest", b"070701second")
    # The kernel looks for the next archive at a multiple of four.
    assert made.read_bytes() == b"first" + bytes(3) + b"070701second"
    os.utime(made.parent, (1, 1))
    assert extend_initrd(first, "digest", b"070701second") == made
    assert made.parent.stat().st_mtime > 1
    assert extend_initrd(first, "other", b"070701second") != made
    made.unlink()
    assert extend_initrd(first, "digest", b"070701second").read_bytes().endswith(b"second")


def test_initramfses_have_a_ceiling_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    now_s = time.time()
    ages_s = {"oldest": 3000, "older": 2000, "old": INITRD_BUSY_S + 60, "new": 10, "newest": 0}
    for name, age_s in ages_s.items():
        write_file(cache.initrd_dir(name) / "initrd", "x" * 1000)
        os.utime(cache.initrd_dir(name), (now_s - age_s, now_s - age_s))

    def limit(max_bytes: int) -> list[str]:
        cache.limit_initrds(max_bytes)
        return [name for name in ages_s if cache.initrd_dir(name).exists()]

    assert limit(5000) == list(ages_s)
    assert limit(4999) == ["older", "old", "new", "newest"]
    # A start that has taken one lately may not have read it.
    assert limit(0) == ["new", "newest"]


def test_new_initramfs_removes_old_ones_over_the_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(Cache.limit_initrds, "__defaults__", (100,))
    first = tmp_path / "initrd"
    first.write_bytes(b"first")
    old = extend_initrd(first, "digest", b"070701" + bytes(80))
    # Not so old that a sweep of the cache removes it.
    used_s = time.time() - 2 * INITRD_BUSY_S
    os.utime(old.parent, (used_s, used_s))
    # A machine that runs with it reads it again when its guest reboots.
    new = extend_initrd(first, "digest", b"070701" + bytes(84), lambda: f"qemu-system-x86_64 -initrd {old}")
    assert new.exists()
    assert old.exists()
    newer = extend_initrd(first, "digest", b"070701" + bytes(88))
    assert newer.exists()
    assert not old.exists()


def test_debug_sections_are_dropped_and_the_others_keep_their_numbers() -> None:
    plain = make_module("vsock")
    fat = add_section(add_section(plain, b".debug_info", b"D" * 100_000), b".kept", b"kept")
    thin = drop_debug(fat)
    assert len(thin) < len(fat) - 99_000
    assert (read_modinfo(thin), read_section(thin, ".kept")) == (read_modinfo(plain), b"kept")
    assert struct.unpack_from("<H", thin, 60) == struct.unpack_from("<H", fat, 60)
    assert drop_debug(plain) == plain
    # Its signature is of every byte.
    signed = fat + b"~Module signature appended~\n"
    assert drop_debug(signed) == signed


def test_module_that_would_grow_stays_as_it_is() -> None:
    """Sections that overlap: each has all of the file."""
    data = add_section(make_module(""), b".debug_info", b"D" * 1000)
    rows_at, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    rows = [list(struct.unpack_from("<IIQQQQIIQQ", data, rows_at + 64 * number)) for number in range(count)]
    whole = [rows[0][0], 1, 0, 0, 0, rows_at, 0, 0, 1, 0]
    table = b"".join(struct.pack("<IIQQQQIIQQ", *row) for row in (*rows, *[whole] * 1000))
    hostile = data[:60] + struct.pack("<H", count + 1000) + data[62:rows_at] + table
    assert drop_debug(hostile) == hostile


def test_endless_device_and_fifo_are_no_modules(make_tree: MakeTree) -> None:
    tree = make_tree()
    module = tree / "net/vmw_vsock/vsock.ko"
    module.unlink()
    module.symlink_to("/dev/zero")
    with pytest.raises(BuildError, match=r"cannot read the module .*/vsock\.ko: it is no regular file") as caught:
        plan_modules(find_tree(tree), find_needs(), TINYS)
    assert "make" in caught.value.hint
    module.unlink()
    # Nobody opens its other end.
    os.mkfifo(module)
    with pytest.raises(BuildError, match=r"cannot read the module .*/vsock\.ko: it is no regular file"):
        plan_modules(find_tree(tree), find_needs(), TINYS)


def test_bytes_of_a_module_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file can have more than its size says, as those of /proc do."""
    monkeypatch.setattr(initrd, "_MODULE_LIMIT_BYTES", 10)
    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(BuildError, match="the module /proc/self/status is larger than"):
        b"".join(ModuleFile(Path("/proc/self/status"), "").chunks())


@pytest.mark.parametrize("size", [0, 3, 64, 100, 200])
def test_broken_module_stays_as_it_is(size: int) -> None:
    data = add_section(make_module(""), b".debug_info", b"D")[:size]
    assert drop_debug(data) == data


def test_root_is_one_that_the_kernel_can_mount(make_tree: MakeTree) -> None:
    tree = make_tree()
    files = find_tree(tree)
    assert has_root(files, "ext4")
    assert not has_root(files, "virtiofs")
    config = tree / ".config"
    config.write_text(
        config.read_text() + "CONFIG_VIRTIO_FS=y\nCONFIG_9P_FS=m\nCONFIG_NET_9P=m\nCONFIG_NET_9P_VIRTIO=m\n"
    )
    assert has_root(find_tree(tree), "virtiofs")
    # Its modules were not built.
    assert not has_root(find_tree(tree), "9p")
    # Another machine needs that as well: what is missing is told by its own name.
    config.write_text(config.read_text().replace("CONFIG_VSOCKETS=m\n", ""))
    assert has_root(find_tree(tree), "virtiofs")
