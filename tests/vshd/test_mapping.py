"""The mapping of vsock to IPv6, as arithmetic; and the guest's side of it in a namespace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S
from tests.vshd.test_init import needs_namespace
from vshd.carry.mapping import MappingError, find_cid, parse_prefix, render_address, render_prefix, render_rules

PREFIX = bytes.fromhex("fd123456789a0001")


@pytest.mark.parametrize("text", ["fd12:3456:789a:1::/64", "fd12:3456:789a:1::", "fd12:3456:789a:1"])
def test_spellings_of_a_prefix(text: str) -> None:
    assert parse_prefix(text) == PREFIX
    assert render_prefix(parse_prefix(text)) == "fd12:3456:789a:1::/64"


@pytest.mark.parametrize(
    "text", ["", "x", "fe80::/64", "fc00::/64", "fd12::1/64", "fd12:3456:789a:1::/48", "fd12::/64\0", "1.2.3.4", "::"]
)
def test_what_is_no_prefix(text: str) -> None:
    with pytest.raises(MappingError):
        parse_prefix(text)


@pytest.mark.parametrize("cid", [2, 3, 40, (1 << 32) - 2])
def test_cid_is_the_interface_part(cid: int) -> None:
    address = render_address(PREFIX, cid)
    assert address.startswith("fd12:3456:789a:1::")
    assert find_cid(PREFIX, PREFIX + cid.to_bytes(8, "big")) == cid


@pytest.mark.parametrize("address", [bytes(16), PREFIX + (1 << 32).to_bytes(8, "big"), PREFIX[:7] + bytes(9)])
def test_addresses_that_are_no_cids(address: bytes) -> None:
    with pytest.raises(MappingError):
        find_cid(PREFIX, address)


def test_rules_replace_those_of_a_killed_one() -> None:
    rules = render_rules(PREFIX, 999)
    assert rules.index("delete table") < rules.index("redirect to :999")
    assert "fd12:3456:789a:1::/64" in rules


GUEST = f"""
import os, socket, sys, threading
sys.path.insert(0, {str(CHECKOUT)!r})
from vshd.carry import endpoints
from vshd.log import Log
from vshd.services.mapped import serve_mapping
from vshd.signals import SIGTERM, Wakeup

# The host's port is a UNIX socket here; all before it, and the way there, is real.
back = socket.socket(socket.AF_UNIX)
back.bind(sys.argv[1])
back.listen()
asked = []
start = endpoints.start_connect
endpoints.start_connect = lambda place: (asked.append(place), start("unix:" + sys.argv[1]))[1]
os.system("ip link set lo up")

def client():
    for port in (1, 445, 65535):
        with socket.create_connection(("fd12::2", port), 10) as mapped:
            connection, _ = back.accept()
            mapped.sendall(b"ping")
            print(asked[-1], connection.recv(10).decode())
            connection.close()
    try:
        with socket.create_connection(("fd12::7", 80), 10) as stranger:
            print("stranger", stranger.recv(1))
    except ConnectionResetError:
        print("stranger reset")
    os.kill(os.getpid(), SIGTERM)

log = Log()
log.open(use_kmsg=False, use_stderr=True)
serve_mapping("fd12::/64", log, Wakeup((SIGTERM,)), threading.Thread(target=client).start)
os.system("nft list tables; ip -6 route show table local | grep fd12")
"""


@needs_namespace
def test_guest_reaches_the_host_by_address(tmp_path: Path) -> None:
    argv = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", GUEST, str(tmp_path / "back")]
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, env=env, check=False)
    lines = done.stdout.splitlines()
    assert lines == ["vsock:2:1 ping", "vsock:2:445 ping", "vsock:2:65535 ping", "stranger reset"], done
    assert "CID 7 is not the host's" in done.stderr
