"""Where vshd finds the machine's token: tables as QEMU makes them, damaged ones, files of every kind."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vshd import firmware
from vshd.firmware import find_token, read_oem_strings
from vshd.pid1.init import find_token_source
from vshd.wire.errors import TokenError
from vshd.wire.proof import TOKEN_PREFIX, render_token

TOKEN = bytes(range(32))
TEXT = render_token(TOKEN)


def structure(kind: int, *strings: bytes, formatted: bytes = b"\1") -> bytes:
    """One SMBIOS structure."""
    head = bytes((kind, 4 + len(formatted))) + b"\0\1" + formatted
    return head + (b"".join(text + b"\0" for text in strings) or b"\0") + b"\0"


BIOS = structure(0, b"SeaBIOS", b"1.16")
NAMELESS = structure(32, formatted=bytes(7))
END = structure(127, formatted=b"")

MakeTable = Callable[[bytes], None]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTable:
    """table(bytes) makes these the firmware's tables."""

    def make(data: bytes) -> None:
        path = tmp_path / "DMI"
        path.write_bytes(data)
        monkeypatch.setattr(firmware, "DMI_TABLE", str(path))

    return make


def test_prefix_is_that_of_the_proof() -> None:
    assert firmware.PREFIX == TOKEN_PREFIX


@pytest.mark.parametrize("others", [[], [b"another"], [b"a", b"b", b"vmkit.tokenx"]])
def test_token_is_found_among_other_strings(table: MakeTable, others: list[bytes]) -> None:
    table(BIOS + NAMELESS + structure(11, *others, TEXT) + structure(16, b"x") + END)
    assert find_token("auto", is_vsock=True) == TOKEN
    assert find_token("smbios", is_vsock=False) == TOKEN


def test_tables_without_a_token_mean_none_or_an_error(table: MakeTable) -> None:
    table(BIOS + structure(11, b"another") + END)
    assert find_token("auto", is_vsock=True) is None
    with pytest.raises(TokenError, match="no token"):
        find_token("smbios", is_vsock=True)


def test_no_tables_mean_none_or_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(firmware, "DMI_TABLE", str(tmp_path / "none"))
    assert find_token("auto", is_vsock=True) is None
    with pytest.raises(TokenError, match="cannot read"):
        find_token("smbios", is_vsock=True)


def test_token_is_asked_of_vsock_clients_unless_told_otherwise(table: MakeTable) -> None:
    table(structure(11, TEXT) + END)
    assert find_token("auto", is_vsock=False) is None
    assert find_token("none", is_vsock=True) is None


@pytest.mark.parametrize("text", [TEXT[:-1], TEXT + b"0", b"vmkit.token:", b"vmkit.token:" + b"z" * 64])
@pytest.mark.parametrize("source", ["auto", "smbios"])
def test_damaged_token_is_an_error_and_not_none(table: MakeTable, source: str, text: bytes) -> None:
    table(structure(11, text) + END)
    with pytest.raises(TokenError) as caught:
        find_token(source, is_vsock=True)
    assert TOKEN.hex()[:16] not in str(caught.value)


def test_two_tokens_are_an_error(table: MakeTable) -> None:
    table(structure(11, TEXT) + structure(11, TEXT) + END)
    with pytest.raises(TokenError, match="several"):
        find_token("auto", is_vsock=True)


def test_what_stands_behind_the_end_is_not_read() -> None:
    assert read_oem_strings(BIOS + END + structure(11, TEXT)) == []


def test_token_in_a_structure_of_another_type_is_none() -> None:
    assert read_oem_strings(structure(1, TEXT) + END) == []


def test_every_cut_of_a_table_is_survived() -> None:
    table = BIOS + NAMELESS + structure(11, b"a", TEXT) + END
    for size in range(len(table)):
        assert read_oem_strings(table[:size]) in ([], [b"a", TEXT])
    for size in range(256):
        read_oem_strings(bytes((11, size)) + table)


def test_table_without_end_is_refused(table: MakeTable) -> None:
    table(bytes(firmware.TABLE_BYTES_MAX + 1))
    with pytest.raises(TokenError, match="larger"):
        find_token("auto", is_vsock=True)


def test_token_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(TEXT + b"\n")
    path.chmod(0o600)
    assert find_token(f"file:{path}", is_vsock=False) == TOKEN


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o601])
def test_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    path.write_bytes(TEXT)
    path.chmod(mode)
    with pytest.raises(TokenError, match="0600"):
        find_token(f"file:{path}", is_vsock=False)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(TEXT)
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "large").write_bytes(bytes(1000))
    (tmp_path / "large").chmod(0o600)
    for name in ("link", "fifo", "large", "none", ""):
        with pytest.raises((TokenError, OSError)):
            find_token(f"file:{tmp_path / name}", is_vsock=False)


@pytest.mark.parametrize("source", ["", "firmware", "smbios,", TEXT.decode()])
def test_unknown_source_is_refused(source: str) -> None:
    with pytest.raises(TokenError, match="token_from"):
        find_token(source, is_vsock=True)


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ("quiet", None),
        ("quiet vmkit.token=smbios", "smbios"),
        ("vmkit.token=smbios vmkit.token=none", "none"),
        ("vmkit.tokens=x xvmkit.token=y", None),
        ("vmkit.token=", ""),
    ],
)
def test_kernels_command_line_says_where_the_token_is(line: str, source: str | None) -> None:
    assert find_token_source(line) == source
