"""The table of architectures: what a row must be, and how a name, a program and an ELF file lead to one."""

import re
import struct
import tomllib
from pathlib import Path

import pytest

from vmkit.architectures import ARCHITECTURES, HOST, find_architecture, find_elf_architecture, find_package
from vmkit.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[2]


def make_head(machine: int, *, order: int = 1) -> bytes:
    """The first bytes of an ELF file (elf.h). order: 1 for the lowest byte first, 2 for the highest."""
    form = "<HH" if order == 1 else ">HH"
    return b"\x7fELF\x02" + bytes([order, 1]) + bytes(9) + struct.pack(form, 2, machine)


def test_rows_have_words_that_programs_take() -> None:
    for name, row in ARCHITECTURES.items():
        assert row.name == name and re.fullmatch(r"[a-z0-9]+", name)
        assert re.fullmatch(r"qemu-system-[a-z0-9_]+", row.qemu)
        assert re.fullmatch(r"linux-image-[a-z0-9-]+", row.kernel) and row.kernel.endswith(name)
        assert re.fullmatch(r"[a-z0-9_]+-linux-gnu", row.triplet)
        assert row.loader.startswith("usr/lib") and "/ld" in row.loader
        assert 512 < row.command_line_bytes < 4096


def test_rows_differ() -> None:
    rows = ARCHITECTURES.values()
    for key in ("qemu", "kernel", "triplet", "loader", "elf_machine"):
        assert len({getattr(row, key) for row in rows}) == len(rows), key


def test_only_the_hosts_architecture_is_not_emulated() -> None:
    assert [name for name, row in ARCHITECTURES.items() if not row.is_emulated] == [HOST]


def test_patterns_of_paths_have_words_of_the_architecture() -> None:
    row = ARCHITECTURES["s390x"]
    assert row.expand("usr/lib/{triplet}/libz.so.1*") == "usr/lib/s390x-linux-gnu/libz.so.1*"
    assert row.expand("{loader}") == "usr/lib/ld64.so.1"
    assert row.expand("a[0-9]{x}") == "a[0-9]{x}"


def test_unknown_name_is_an_error_with_the_known_ones() -> None:
    assert find_architecture("arm64") is ARCHITECTURES["arm64"]
    with pytest.raises(ConfigError, match="no architecture 'aarch64'; the architectures are: amd64, arm64, riscv64, s"):
        find_architecture("aarch64")


def test_package_of_a_qemu_is_found_by_its_path() -> None:
    assert find_package("/usr/bin/qemu-system-s390x") == "qemu-system-misc"
    assert find_package("qemu-system-aarch64") == "qemu-system-arm"
    assert find_package("/opt/my-qemu") == "qemu-system-x86"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (make_head(62), "amd64"),
        (make_head(183), "arm64"),
        (make_head(243), "riscv64"),
        (make_head(22, order=2), "s390x"),
        # ppc64el, which vmkit has no row for.
        (make_head(21), ""),
        (make_head(62)[:19], ""),
        (b"#!/bin/sh\n" + bytes(20), ""),
        (b"", ""),
    ],
)
def test_elf_file_tells_its_architecture(head: bytes, name: str) -> None:
    assert find_elf_architecture(head) == name


def test_page_has_a_line_for_every_row() -> None:
    page = (CHECKOUT / "docs/howto/architectures.md").read_text()
    for row in ARCHITECTURES.values():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{row.name}` |"))
        for word in (row.package, row.qemu, row.board.partition(",")[0], row.cpu, row.kernel):
            assert f"`{word}`" in line, (row.name, word)


def test_makefile_installs_the_qemus_for_the_slow_tests() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    words = next(line for line in makefile.splitlines() if line.startswith("SLOW_PACKAGES :=")).split()
    assert {row.package for row in ARCHITECTURES.values() if row.is_emulated} <= set(words)


def test_shipped_recipes_name_no_library_of_one_architecture() -> None:
    """A recipe that others extend for every architecture has placeholders in its paths."""
    for name in ("tiny", "any"):
        recipe = tomllib.loads((CHECKOUT / f"images/{name}.toml").read_text())
        for patterns in recipe.get("extract", {}).values():
            assert not any(row.triplet in pattern for row in ARCHITECTURES.values() for pattern in patterns)
