"""A kernel's BTF: made by hand with every kind, cut at every byte, garbled; and the real one of a kernel, elsewhere."""

import struct

import pytest

from tests.vmkit.image.wall.btf_maker import FUNC, TRAILING, BtfMaker, make_kernel_btf
from vmkit.image.wall.btf import BTF_LIMIT_BYTES, BtfError, find_functions, parse_btf

NAMES = ("bpf_lsm_socket_connect", "bpf_lsm_socket_bind")


def test_functions_are_found_behind_types_of_every_kind() -> None:
    data = make_kernel_btf()
    found = find_functions(parse_btf(data), NAMES)
    assert {name: function.type_id for name, function in found.items()} == {
        "bpf_lsm_socket_bind": len(TRAILING) + 1,
        "bpf_lsm_socket_connect": len(TRAILING) + 2,
    }
    for name, function in found.items():
        for mark in (function.record, function.text):
            assert data[mark.offset : mark.offset + len(mark.data)] == mark.data
        assert function.text.data == name.encode() + b"\0"
        assert struct.unpack("<III", function.record.data)[1] >> 24 & 0x1F == FUNC


def test_longer_header_and_kind_flag_are_read() -> None:
    maker = BtfMaker()
    maker.add(4, "flagged", flag=1)
    wanted = maker.add(FUNC, "wanted")
    (found,) = find_functions(parse_btf(maker.render(header_bytes=40)), ["wanted"]).values()
    assert found.type_id == wanted


def test_name_of_another_kind_or_a_part_of_a_name_is_not_it() -> None:
    maker = BtfMaker()
    maker.add(8, "wanted")
    maker.add(FUNC, "not_wanted")
    maker.add(FUNC, "wanted_not")
    with pytest.raises(BtfError, match="knows no function wanted"):
        find_functions(parse_btf(maker.render()), ["wanted"])
    with pytest.raises(BtfError, match="knows no function nowhere"):
        find_functions(parse_btf(maker.render()), ["nowhere"])


def test_cut_anywhere_is_an_error() -> None:
    data = make_kernel_btf()
    for size in range(len(data)):
        with pytest.raises(BtfError):
            find_functions(parse_btf(data[:size]), NAMES)


@pytest.mark.parametrize("kind", [0, 20, 31])
def test_unknown_kind_is_named(kind: int) -> None:
    maker = BtfMaker()
    maker.add(kind)
    maker.add(FUNC, "wanted")
    with pytest.raises(BtfError, match=f"unknown kind {kind}"):
        find_functions(parse_btf(maker.render()), ["wanted"])


def test_types_that_end_inside_one_are_an_error() -> None:
    maker = BtfMaker()
    maker.add(8, "wanted")
    maker.types += bytes(7)
    with pytest.raises(BtfError, match="ends inside a type"):
        find_functions(parse_btf(maker.render()), ["wanted"])


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"\xeb\x9f", "does not begin"),
        (2, b"\x02", "does not begin"),
        (4, struct.pack("<I", 12), "does not begin"),
        (12, struct.pack("<I", 0xFFFFFFFF), "ends before"),
        (20, struct.pack("<I", 0xFFFFFFFF), "ends before"),
    ],
)
def test_header_that_cannot_be_is_refused(offset: int, data: bytes, message: str) -> None:
    blob = bytearray(make_kernel_btf())
    blob[offset : offset + len(data)] = data
    with pytest.raises(BtfError, match=message):
        parse_btf(bytes(blob))


def test_blob_has_a_ceiling() -> None:
    with pytest.raises(BtfError, match="larger than"):
        parse_btf(bytes(BTF_LIMIT_BYTES + 1))
