"""BTF made by hand, for tests: a header, types of every kind, and names."""

import struct
from dataclasses import dataclass, field

# Kind: bytes of what follows it (linux/btf.h); the members of those that have some are three.
MEMBERS = 3
TRAILING = {
    1: 4, 2: 0, 3: 12, 4: 12 * MEMBERS, 5: 12 * MEMBERS, 6: 8 * MEMBERS, 7: 0, 8: 0, 9: 0, 10: 0, 11: 0, 12: 0,
    13: 8 * MEMBERS, 14: 4, 15: 12 * MEMBERS, 16: 0, 17: 4, 18: 0, 19: 12 * MEMBERS,
}  # fmt: skip
WITH_MEMBERS = {4, 5, 6, 13, 15, 19}
FUNC = 12


@dataclass
class BtfMaker:
    """add(kind, name) appends a type and gives its id."""

    types: bytearray = field(default_factory=bytearray)
    names: bytearray = field(default_factory=lambda: bytearray(b"\0"))
    count: int = 0

    def add(self, kind: int, name: str = "", *, flag: int = 0) -> int:
        name_off = 0
        if name:
            name_off = len(self.names)
            self.names += name.encode() + b"\0"
        vlen = MEMBERS if kind in WITH_MEMBERS else 0
        self.types += struct.pack("<III", name_off, flag << 31 | kind << 24 | vlen, 0xFFFFFFFF)
        self.types += bytes([0xA5]) * TRAILING.get(kind, 0)
        self.count += 1
        return self.count

    def render(self, *, header_bytes: int = 24) -> bytes:
        header = struct.pack(
            "<HBBIIIII", 0xEB9F, 1, 0, header_bytes, 0, len(self.types), len(self.types), len(self.names)
        )
        return header + bytes(header_bytes - 24) + bytes(self.types) + bytes(self.names)


def make_kernel_btf() -> bytes:
    """Every kind once, then the two hooks."""
    maker = BtfMaker()
    for kind in TRAILING:
        maker.add(kind, f"kind_{kind}")
    maker.add(FUNC, "bpf_lsm_socket_bind")
    maker.add(FUNC, "bpf_lsm_socket_connect")
    return maker.render()
