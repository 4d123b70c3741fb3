"""The header's bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.vsock import packet as pk

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def test_header_has_44_bytes_in_the_specified_order() -> None:
    header = pk.Header(2, 3, 0x01020304, 0x0A0B0C0D, 5, 1, 6, 3, 0x40000, 0x11223344)
    assert header.encode().hex() == (
        "0200000000000000"  # src_cid
        "0300000000000000"  # dst_cid
        "04030201"  # src_port
        "0d0c0b0a"  # dst_port
        "05000000"  # len
        "0100"  # type
        "0600"  # op
        "03000000"  # flags
        "00000400"  # buf_alloc
        "44332211"  # fwd_cnt
    )
    assert pk.HEADER_SIZE == 44


@given(st.builds(pk.Header, U64, U64, U32, U32, U32, U16, U16, U32, U32, U32), st.binary(max_size=5))
def test_header_comes_back_from_its_bytes(header: pk.Header, trailing: bytes) -> None:
    assert pk.decode_header(header.encode() + trailing) == header


@given(st.binary(min_size=44, max_size=44))
def test_any_44_bytes_are_a_header(data: bytes) -> None:
    assert pk.decode_header(memoryview(data)).encode() == data


@pytest.mark.parametrize(("op", "name"), [(0, "INVALID"), (1, "REQUEST"), (7, "CREDIT_REQUEST"), (8, "op 8")])
def test_operation_has_a_name_for_the_log(op: int, name: str) -> None:
    assert pk.name_op(op) == name
