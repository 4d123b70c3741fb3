"""The mapping of vsock addresses to IPv6: CID in the last 32 bits of a unique-local /64, vsock port as TCP port.

    [fd12:3456:789a:1::3]:80   is   port 80 of CID 3

A program that knows only TCP connects to such an address. The kernel delivers each port's connections here, by a
`local` route for the whole prefix and a NAT rule that redirects them to one listener. The listener asks the kernel for
the client's original destination. Pure but for that question; shared with vsh, as vshd.carry.bridge is.
"""

import _socket
import struct

# RFC 4193: fc00::/7, and the bit that says "locally assigned".
UNIQUE_LOCAL = 0xFD
PREFIX_BYTES = 8
# Everything of ours in the kernel's tables has this name.
TABLE = "vmkit_vsock"
# linux/netfilter_ipv6/ip6_tables.h; the address is a struct sockaddr_in6 of 28 bytes.
SOL_IPV6 = 41
IP6T_SO_ORIGINAL_DST = 80
SOCKADDR_IN6_BYTES = 28


class MappingError(ValueError):
    """A prefix that is none, or an address outside it."""


def parse_prefix(text: str) -> bytes:
    """The 8 bytes of a unique-local /64, written `fd12:3456:789a:1::/64` or without its end. Raises MappingError."""
    bare = text.removesuffix("/64")
    try:
        address = _socket.inet_pton(_socket.AF_INET6, bare if "::" in bare else f"{bare}::")
    except (OSError, ValueError):
        address = b""
    if len(address) != 16 or any(address[PREFIX_BYTES:]) or address[0] != UNIQUE_LOCAL:
        raise MappingError(f"'{text}' is no unique-local prefix of 64 bits, such as fd12:3456:789a:1::/64")
    return address[:PREFIX_BYTES]


def render_prefix(prefix: bytes) -> str:
    """The prefix as tools take it."""
    return f"{_socket.inet_ntop(_socket.AF_INET6, prefix + bytes(PREFIX_BYTES))}/64"


def render_address(prefix: bytes, cid: int) -> str:
    """The address of a CID."""
    return _socket.inet_ntop(_socket.AF_INET6, prefix + cid.to_bytes(PREFIX_BYTES, "big"))


def find_cid(prefix: bytes, address: bytes) -> int:
    """The CID in an address of 16 bytes. Raises MappingError when it is no address of ours."""
    if address[:PREFIX_BYTES] != prefix or any(address[PREFIX_BYTES : PREFIX_BYTES + 4]):
        raise MappingError(f"{_socket.inet_ntop(_socket.AF_INET6, address)} is no CID's address")
    return int.from_bytes(address[-4:], "big")


def find_original(fd: int) -> tuple[bytes, int]:
    """Where the client of a redirected connection wanted to go: the address and the port. Raises OSError."""
    connection = _socket.socket(fileno=fd)
    try:
        raw = connection.getsockopt(SOL_IPV6, IP6T_SO_ORIGINAL_DST, SOCKADDR_IN6_BYTES)
    finally:
        connection.detach()
    (port,) = struct.unpack_from("!H", raw, 2)
    return raw[8:24], port


def plan_commands(prefix: bytes) -> "tuple[list[list[str]], list[list[str]]]":
    """What routes the prefix to this system, and what undoes that. The rules (render_rules) go to nft's stdin."""
    route = ["local", render_prefix(prefix), "dev", "lo"]
    return (
        [["ip", "-6", "route", "replace", *route]],
        [["nft", "delete", "table", "ip6", TABLE], ["ip", "-6", "route", "del", *route]],
    )


def render_rules(prefix: bytes, port: int) -> str:
    """nft's rules: TCP that this system sends to the prefix goes to `port` of loopback."""
    return (
        f"table ip6 {TABLE}\n"
        f"delete table ip6 {TABLE}\n"
        f"table ip6 {TABLE} {{\n"
        "  chain output {\n"
        "    type nat hook output priority -100; policy accept;\n"
        f"    ip6 daddr {render_prefix(prefix)} meta l4proto tcp redirect to :{port}\n"
        "  }\n"
        "}\n"
    )
