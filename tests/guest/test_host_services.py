"""ChromeOS's host services in a real guest: its maitred reports VmReady, and no user forges a record of root's.

The guest's client is written here, byte by byte, for an image need not have gRPC.
"""

import json
import time

from tests.guest.conftest import Run
from tests.guest.test_syslog import read_syslog
from tests.vmkit.cros.google import make_request
from tests.vsh.live import wait_until
from vmkit.cros.messages import COLLECT_USER_LOGS, VM_READY
from vmkit.cros.notes import LOGS_PORT, READY_PORT
from vmkit.pool.pool import PooledMachine

# One unary call over HTTP/2 (RFC 9113), its headers as literals (RFC 7541, 6.2.2). It ends with the server's trailers:
# the second frame of HEADERS, or the first one where the server refuses.
CALL = """
import socket, sys
port, path, body = int(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3])
def frame(kind, flags, stream, data):
    return len(data).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + data
headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "host"), ("te", "trailers")]
block = b""
for name, value in [*headers, ("content-type", "application/grpc")]:
    block += b"\\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
with socket.socket(socket.AF_VSOCK) as s:
    s.settimeout(100)
    s.connect((2, port))
    message = b"\\0" + len(body).to_bytes(4, "big") + body
    s.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block))
    s.sendall(frame(0, 1, 1, message))
    answers = s.makefile("rb")
    while head := answers.read(9):
        data = answers.read(int.from_bytes(head[:3], "big"))
        if head[3] == 4 and not head[4]:
            s.sendall(frame(4, 1, 0, b""))
        if head[3] == 1 and head[4] & 1:
            print("answered", b"\\x010" in data or data[-1:] == b"0")
            break
"""


def call(vsh: Run, name: str, user: str, port: int, path: str, body: bytes = b"") -> None:
    done = vsh("--vm_name", name, f"--user={user}", "--", "python3", "-c", CALL, str(port), path, body.hex())
    assert (done.returncode, done.stdout.split()[:1]) == (0, [b"answered"]), done


def read_status(vmkit: Run, name: str) -> dict[str, object]:
    done = vmkit("status", name, "--json")
    assert done.returncode == 0, done.stderr.decode()
    status: dict[str, object] = json.loads(done.stdout)
    return status


def test_report_of_a_guest_is_a_fact_of_its_machine_alone(ready: str, vm: PooledMachine, vmkit: Run, vsh: Run) -> None:
    """On `user` every machine has its own port, so that no guest can report for another one."""
    before_s = time.time()
    call(vsh, vm.name, "root", READY_PORT, VM_READY)
    wait_until(lambda: "vm_ready" in read_status(vmkit, vm.name), "the record has the report")
    first = read_status(vmkit, vm.name)["vm_ready"]
    assert isinstance(first, float)
    assert before_s - 1 <= first <= time.time() + 1
    assert "vm_ready" not in read_status(vmkit, ready)
    # The report counts once. READY is another thing, and has been there since the start.
    call(vsh, vm.name, "user", READY_PORT, VM_READY)
    assert read_status(vmkit, vm.name)["vm_ready"] == first
    assert read_status(vmkit, vm.name)["state"] == "ready"


def test_user_of_the_guest_leaves_lines_without_a_writer(ready: str, vmkit: Run, vsh: Run) -> None:
    """It claims to be the kernel, in an emergency, and root's sshd with a process id."""
    assert vsh("--vm_name", ready, "--", "logger", "-t", "sshd", "of root").returncode == 0
    texts = (b"kernel: forged line", b"sshd[1]: forged login", b"<0>forged head", b"6,1,1,-;forged record")
    request = make_request(*({"severity": 1, "content": text} for text in texts))
    call(vsh, ready, "user", LOGS_PORT, COLLECT_USER_LOGS, request.SerializeToString())

    def find() -> list[dict[str, object]]:
        return [record for record in read_syslog(vmkit, ready) if "forged" in str(record["text"])]

    wait_until(lambda: len(find()) == 4, "all lines are in the log")
    for record in find():
        keys = ("source", "facility", "pid", "uid", "gid")
        assert [record[key] for key in keys] == ["log_collector", "user", None, None, None]
    (real,) = [record for record in read_syslog(vmkit, ready) if record["text"] == "of root"]
    assert real["uid"] == 0
