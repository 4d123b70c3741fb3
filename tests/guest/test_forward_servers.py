"""Forwards with what the paper on virtio-vsock forwarded: nginx with curl, Samba with its client, and the IPv6 mapping
both ways. All servers and smbclient are Debian's, in the guest; curl is the host's.
"""

import contextlib
import hashlib
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Run
from tests.guest.test_forward import BIN, running
from tests.vsh.live import Program, ended, read_line
from vsh.registry import find_machine

RECIPE = str(Path(__file__).with_name("servers.toml"))
NAME = "servers"
MACHINE = ("--vm_name", NAME)
PREFIX = "fd56:6d6b:6974:1"
# Until somebody listens there; the shell's own words are slow under emulation, and enough.
WAIT = 'until grep -q ":%04X .* 0A " /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done'
# It ends with a stdin that is a pipe: the session's is not for it.
SMBD = ("sh", "-c", "exec smbd --foreground --no-process-group --debug-stdout </dev/null")


@pytest.fixture(scope="module")
def servers(vmkit: Run, vsh: Run) -> Iterator[str]:
    """A machine with nginx on TCP port 80 and a UNIX socket, and smbd on TCP port 445."""
    done = vmkit("up", RECIPE, "--name", NAME, "--cid", "41", "--memory", "1G", "--accel", "tcg", timeout_s=600)
    assert done.returncode == 0, done.stderr.decode()
    with contextlib.ExitStack() as stack:
        stack.callback(vmkit, "kill", NAME)
        for argv in (("nginx",), SMBD):
            process = subprocess.Popen([str(BIN / "vsh"), *MACHINE, "--", *argv], stdin=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        page = vsh(
            *MACHINE, "--", "sh", "-c", f"echo hello from the guest > /srv/web/index.html; {WAIT % 80}; {WAIT % 445}"
        )
        assert page.returncode == 0
        yield NAME


def curl(*words: str, **options: Any) -> bytes:
    done = subprocess.run(["curl", "-sS", "-m", "60", *words], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return bytes(done.stdout)


@pytest.mark.parametrize("target", ["localhost:80", "/run/nginx.sock"])
def test_curl_reads_from_nginx_in_the_guest(servers: str, vsh: Run, target: str, tmp_path: Path) -> None:
    here = tmp_path / "web.sock"
    vsh(*MACHINE, "--", "sh", "-c", "head -c 5000000 /dev/urandom > /srv/web/big")
    digest = vsh(*MACHINE, "--", "sha256sum", "/srv/web/big").stdout.split()[0].decode()
    with running(*MACHINE, "-v", "-N", "-L", f"{here}:{target}", stream="stderr"):
        assert curl("--unix-socket", str(here), "http://guest/") == b"hello from the guest\n"
        # One connection, several requests: keep-alive.
        urls = ["http://guest/big", "http://guest/"]
        data = curl("--unix-socket", str(here), *urls)
    assert hashlib.sha256(data[:5_000_000]).hexdigest() == digest
    assert data[5_000_000:] == b"hello from the guest\n"


def test_ports_of_the_guest_appear_by_themselves(servers: str, vmkit: Run, vsh: Run) -> None:
    """nginx, which listens already, and busybox's httpd, which comes and goes; not vshd's own mapping."""
    script = "echo by itself > /tmp/index.html; exec busybox httpd -f -p 127.0.0.1:{} -h /tmp"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("forward", NAME, "--auto", "--json", "--exclude", "445")
        with auto(*words) as read_event:
            events = [read_event()]
            assert [event["port"] for event in events] == [80]
            assert curl(f"http://{events[0]['listening'][0]}/") == b"hello from the guest\n"
            httpd = subprocess.Popen([str(BIN / "vsh"), *MACHINE, "--", "sh", "-c", script.format(port)])
            try:
                opened = read_event()
                assert (opened["event"], opened["port"]) == ("opened", port)
                assert opened["reason"] == f"port {port} of this host is in use"
                assert curl(f"http://{opened['listening'][0]}/") == b"by itself\n"
            finally:
                httpd.terminate()
                httpd.wait()
            assert (read_event()["event"], opened["port"]) == ("closed", port)


@contextlib.contextmanager
def auto(*words: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """A running `vmkit forward --auto`, which Ctrl-C ends; gives its next event."""
    argv = [str(BIN / "vmkit"), *words]
    with Program(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process, ended(process):
        yield lambda: json.loads(read_line(process.stdout))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT


def test_unmodified_client_reaches_a_guest_by_address(servers: str, vmkit: Run, vsh: Run) -> None:
    """nginx behind the guest's vsock port 80, curl in a namespace where the guest is an IPv6 address."""
    relay = "from vshd.__main__ import main; import sys; sys.exit(main())"
    inetd = ("python3", "-I", "-S", "-c", relay, "--inetd", "80", "--log_stderr", "--", "nc", "127.0.0.1", "80")
    with running(*MACHINE, "--", "sh", "-c", 'echo up; exec "$@"', "sh", *inetd, stream="stdout"):
        url = f"http://[{PREFIX}::29]/"
        for _ in range(3):
            done = vmkit("forward", "--ipv6", "--prefix", f"{PREFIX}::/64", "--", "curl", "-sS", "-m", "60", url)
            if done.returncode == 0:
                break
        assert done.stdout == b"hello from the guest\n", done.stderr
        nobody = vmkit(
            "forward", "--ipv6", "--prefix", PREFIX, "--", "curl", "-sS", "-m", "60", f"http://[{PREFIX}::29]:9/"
        )
        assert nobody.returncode != 0
        assert b"nothing listens on port 9 of machine 'servers'" in nobody.stderr


def test_samba_over_the_mapping_and_two_forwards(servers: str, vsh: Run) -> None:
    """smbclient there -> [PREFIX::2]:445 -> this host's vsock port 445 -> a TCP port here -> the guest's smbd."""
    script = f"""
        cd /tmp && head -c 3000000 /dev/urandom > sent &&
        smbclient -N //{PREFIX.replace(":", "-")}--2.ipv6-literal.net/share -c 'put sent kept; get kept got; ls' &&
        cmp sent got && cmp sent /srv/share/kept && echo the same
    """
    with (
        running(*MACHINE, "-v", "-N", "-L", "0:127.0.0.1:445", stream="stderr") as (_, told),
        running(
            *(*MACHINE, "-v", "-N", "-R"),
            f"vsock:445:{told.split(' at tcp:')[1].split(' ')[0]}",
            stream="stderr",
        ),
    ):
        done = vsh(*MACHINE, "--", "sh", "-c", script)
    assert done.stdout.endswith(b"the same\n"), done
    assert b"kept" in done.stdout


def test_lasting_forward_survives_the_guests_restart(servers: str, built: None, vmkit: Run, vsh: Run) -> None:
    """It listens without its machine, and serves the next one of that name."""
    script = "mkdir -p /tmp/w; echo run $0 > /tmp/w/index.html; exec busybox httpd -f -p 127.0.0.1:8000 -h /tmp/w"

    def serve(number: int) -> "subprocess.Popen[bytes]":
        assert vmkit("up", "--accel", "tcg", "--name", "restarted").returncode == 0
        process = subprocess.Popen([str(BIN / "vsh"), "--vm_name", "restarted", "--", "sh", "-c", script, str(number)])
        assert vsh("--vm_name", "restarted", "--", "sh", "-c", WAIT % 8000).returncode == 0
        return process

    process = serve(1)
    listen = ("-L", "0:localhost:8000", "-R", "8001:localhost:1", "--json")
    done = vmkit("forward", "restarted", *listen)
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)
    url = f"http://{kept['listening'][0].removeprefix('tcp:')}/"
    try:
        assert curl(url) == b"run 1\n"
        assert vmkit("down", "restarted").returncode == 0
        process.wait()
        gone = subprocess.run(["curl", "-sS", "-m", "60", url], capture_output=True, check=False)
        assert gone.returncode != 0
        process = serve(2)
        assert curl(url) == b"run 2\n"
        # The listener in the guest comes back by itself.
        assert vsh("--vm_name", "restarted", "--", "sh", "-c", WAIT % 8001, timeout_s=60).returncode == 0
    finally:
        assert vmkit("forward", "--remove", str(kept["number"])).returncode == 0
        if find_machine(name="restarted"):
            vmkit("kill", "restarted")
        process.wait()
    assert vmkit("forward", "--list").stdout == b""
