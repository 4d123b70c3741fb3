"""What every attempt must end in: the rules of the wall as one pure function, and the table made from it.

The suite compares each attempt of each guest with `expect`; docs/explanation/security.md holds `render_table`. A rule
names the layer or the part of the kernel that decides, in the order in which the kernel asks them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.guest.wall.inside import attacker
from tests.guest.wall.scene import ALL, MATRIX, TOKEN, Layers, Outcome, Scene

# What an attacker came for. `harmless` steps are tried and shown, but give nothing that could be used.
INTRUSIONS = frozenset({"served", "connected", "answered", "bound"})
LOCAL_CIDS = ("1", "own")
SERVICES = {
    ("stream", attacker.VSHD_PORT): "served",
    ("stream", attacker.STREAM_PORT): "connected",
    ("stream", attacker.LOW_PORT): "connected",
    ("seqpacket", attacker.SEQPACKET_PORT): "connected",
}


def expect(scene: Scene, outcome: Outcome) -> frozenset[str]:
    """The results that `outcome`'s attempt may have in this scene; nearly always one."""
    if outcome.attempt == "flood":
        return _expect_flood(scene, outcome)
    if outcome.attempt == "bind":
        result = _expect_bind(scene, outcome)
    elif outcome.attempt in CLIMBS:
        return CLIMBS[outcome.attempt](scene, outcome)
    elif outcome.phase == "undo":
        # Root has taken away what is in the kernel; the daemon is another process of root's, and was left alone.
        layers = replace(scene.layers, transport=False, kernel=False)
        result = _expect_connect(replace(scene, layers=layers), replace(outcome, phase="loopback"))
    else:
        result = _expect_connect(scene, outcome)
    return frozenset({result})


def is_intrusion(outcome: Outcome) -> bool:
    """Whether somebody who is not root of the guest got what the host alone, or root, should have."""
    if outcome.who == "root":
        return False
    if outcome.attempt in CLIMBS:
        return outcome.attempt not in INFORMATION and outcome.result.startswith("done")
    return outcome.result in INTRUSIONS


def find_surprises(scene: Scene, outcomes: list[Outcome]) -> list[str]:
    """Attempts that ended otherwise than the table says, equal ones together."""
    found: Counter[str] = Counter()
    for outcome in outcomes:
        wanted = expect(scene, outcome)
        if outcome.result not in wanted:
            what = f"{outcome.attempt} {outcome.type} cid {outcome.cid} port {outcome.port} from {outcome.source}"
            who = f"{outcome.who}, {outcome.phase}"
            found[f"{what} by {who}: {outcome.result}, not {' or '.join(sorted(wanted))}"] += 1
    return [f"{text} ({count}x)" for text, count in found.items()]


def is_loopback_up(scene: Scene, phase: str) -> bool:
    """Whether vsock_loopback is loaded: modprobe obeys the transport layer, and before it was asked nobody has."""
    return phase == "loopback" and not scene.layers.transport


def _expect_flood(scene: Scene, outcome: Outcome) -> frozenset[str]:
    """After root's modprobe. Nonsense is refused, or hung up on."""
    result = _expect_connect(scene, replace(outcome, phase="loopback"))
    return frozenset({"refused", "closed"} if result == "served" else {result})


def _expect_bind(scene: Scene, outcome: Outcome) -> str:
    if outcome.type == "datagram":
        return "ENODEV"  # no transport of a guest has datagrams: socket() fails
    if outcome.port < 1024:
        return "bound" if outcome.who == "root" else "EACCES"
    if scene.layers.kernel and outcome.who != "root":
        return "EPERM"
    if outcome.cid == "1" and not is_loopback_up(scene, outcome.phase):
        return "EADDRNOTAVAIL"
    # The daemon layer is there before the hook, and so before any user.
    is_vshd_there = outcome.phase != "boot" or scene.layers.daemon
    return "EADDRINUSE" if is_vshd_there else "bound"


def _expect_connect(scene: Scene, outcome: Outcome) -> str:
    is_loopback = is_loopback_up(scene, outcome.phase)
    if outcome.type == "datagram":
        return "ENODEV"
    if outcome.source == "low" and outcome.who != "root":
        return "EACCES"
    if outcome.attempt == "from-local" and not is_loopback:
        return "EADDRNOTAVAIL"
    if outcome.attempt == "other-family":
        return "EINVAL"
    if scene.layers.kernel and outcome.cid != "2":
        return "EPERM"
    if is_loopback and outcome.cid in LOCAL_CIDS:
        return _expect_service(scene, outcome)
    return _expect_host(scene, outcome)


def _expect_service(scene: Scene, outcome: Outcome) -> str:
    """Over the loopback: what the service itself does."""
    if _still_has_an_error(scene, outcome):
        return "ECONNRESET"
    result = SERVICES.get((outcome.type, outcome.port), "ECONNRESET")
    if result != "served":
        return result
    # The attacker's hello is a legacy client's, which proves nothing.
    is_refused = scene.layers.token and scene.backend == "vhost"
    return "closed" if scene.layers.daemon else "refused" if is_refused else "served"


def _expect_host(scene: Scene, outcome: Outcome) -> str:
    """Through the device: the host's side drops (vhost) or resets (our device) what is not meant for it."""
    if outcome.type == "seqpacket" and scene.backend == "user":
        return "ESOCKTNOSUPPORT"  # our device does not offer it
    if outcome.cid == "own":
        return "ENODEV"
    if scene.backend == "vhost" and (outcome.type, outcome.cid, outcome.port) == ("stream", "2", attacker.VSHD_PORT):
        # The host is itself a guest there, and has a vshd that serves its own host alone: this is the nested guest.
        return "closed"
    if outcome.cid == "2" or scene.backend == "user" or _still_has_an_error(scene, outcome):
        return "ECONNRESET"
    return "ETIMEDOUT"


def _still_has_an_error(scene: Scene, outcome: Outcome) -> bool:
    """The first connect's, which 6.1 leaves in the socket."""
    return outcome.attempt == "second-connect" and scene.kernel == "6.1"


# What one attempt may result in.
Rule = Callable[[Scene, Outcome], frozenset[str]]


def _always(*results: str) -> Rule:
    return lambda _scene, _outcome: frozenset(results)


def _expect_module(scene: Scene, outcome: Outcome) -> frozenset[str]:
    if outcome.who != "root":
        return frozenset({"EPERM"})
    # insmod is not modprobe: root gets past the transport layer, and the second time the module is there.
    return frozenset({"done", "EEXIST"})


def _expect_unpin(scene: Scene, outcome: Outcome) -> frozenset[str]:
    if not scene.layers.kernel:
        return frozenset({"none"})
    return frozenset({"done", "none"}) if outcome.who == "root" else frozenset({"EACCES"})


def _expect_unmount(scene: Scene, outcome: Outcome) -> frozenset[str]:
    if not scene.layers.kernel:
        return frozenset({"none"})
    # A namespace of one's own holds the mounts it was given locked together.
    return frozenset({"root": {"done"}, "user": {"EPERM"}, "namespace": {"EINVAL"}}[outcome.who])


def _expect_setuid(scene: Scene, outcome: Outcome) -> frozenset[str]:
    """Debian's own; none of them speaks vsock, and the kernel layer asks for the real uid."""
    is_known = scene.image == "debian" and DEBIAN_SETUID.issuperset(outcome.result.split())
    return frozenset({outcome.result if is_known else "none"})


# Of util-linux, passwd, login and libpam-modules.
DEBIAN_SETUID = frozenset(
    f"/usr/{path}"
    for path in (
        *("bin/chage", "bin/chfn", "bin/chsh", "bin/expiry", "bin/gpasswd", "bin/mount", "bin/newgrp", "bin/passwd"),
        *("bin/su", "bin/umount", "sbin/unix_chkpwd"),
    )
)
# Steps that only tell what is there.
INFORMATION = frozenset({"list vsock sockets"})
CLIMBS: dict[str, Rule] = {
    "find leaked descriptors": _always("none"),
    "trace vshd": _always("EPERM"),
    "write vshd's memory": _always("EACCES"),
    "list vshd's files": _always("EACCES"),
    "read vshd's environment": _always("EACCES"),
    "take vshd's descriptors": _always("EPERM"),
    "signal vshd": _always("EPERM"),
    "load vsock_loopback": _expect_module,
    "make the kernel load it": _always("none"),
    "list vsock sockets": _always("ENOENT"),
    "set the modprobe program": _always("EACCES"),
    "set modules_disabled": _always("EACCES"),
    "load a BPF program": _always("EPERM"),
    "remove the pins": _expect_unpin,
    "unmount the pins": _expect_unmount,
    "open memory": _always("EACCES"),
    "open the consoles": _always("EACCES"),
    "read the firmware's tables": _always("EACCES"),
    "open the PCI devices": _always("EACCES"),
    "mount over /run": _always("EPERM"),
    "find writable files": _always("none"),
    "find setuid programs": _expect_setuid,
}


# The tables of docs/explanation/security.md. Each row is a representative of attempts that end alike; the columns are
# the sets of layers that are attacked on the backend, those of `vhost` between the first and the last by
# `make wall-full` alone.
COLUMNS = {"user": MATRIX, "vhost": (*MATRIX[:-1], TOKEN, ALL)}


def _attempt(name: str, **fields: str | int) -> Outcome:
    values: dict[str, Any] = {
        "attempt": name, "who": "user", "uid": attacker.USER_ID, "phase": "loopback", "type": "stream", "cid": "1",
        "port": attacker.VSHD_PORT, "source": "auto", "result": "", "seconds": 0.0,
    }  # fmt: skip
    return Outcome(**(values | fields))


ROWS = (
    ("a user connects to CID 1, vshd's port", _attempt("connect")),
    ("a user connects to the guest's own CID, vshd's port", _attempt("connect", cid="own")),
    ("the same, as root of a user namespace", _attempt("connect", who="namespace", cid="own")),
    ("the same, by io_uring", _attempt("io-uring", cid="own")),
    ("a user connects to another service of the guest", _attempt("connect", port=attacker.STREAM_PORT)),
    (
        "a user connects to a seqpacket service of the guest",
        _attempt("connect", type="seqpacket", port=attacker.SEQPACKET_PORT),
    ),
    ("root of the guest connects to CID 1, vshd's port", _attempt("connect", who="root")),
    ("a user takes vshd's port before vshd has it", _attempt("bind", phase="boot", cid="any")),
    ("a user takes vshd's port while vshd has it", _attempt("bind", cid="any")),
    ("a user connects to another guest's CID", _attempt("connect", cid="4")),
    ("a user connects to CID 0 or 2^32-1", _attempt("connect", cid="0")),
    ("a user speaks to the host's ready port", _attempt("connect", cid="2", port=7777)),
    ("a user does so from a port below 1024", _attempt("connect", cid="2", port=7777, source="low")),
    ("a user opens a datagram socket", _attempt("connect", type="datagram")),
    ("a user loads `vsock_loopback`", _attempt("load vsock_loopback")),
    ("a user removes the kernel layer's pins", _attempt("remove the pins")),
    ("a user traces vshd, or takes its descriptors", _attempt("trace vshd")),
    (
        "root of the guest loads the module with insmod, removes the pins, and connects",
        _attempt("connect", who="root", phase="undo"),
    ),
    (
        "the same, to another service of the guest",
        _attempt("connect", who="root", phase="undo", port=attacker.STREAM_PORT),
    ),
)


def render_table(backend: str = "user") -> str:
    """The Markdown table: attempts in rows, layers in columns. What gets through is in bold."""
    columns = COLUMNS[backend]
    lines = ["| attempt, after root's `modprobe vsock_loopback` | " + " | ".join(map(_title, columns)) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for text, attempt in ROWS:
        cells = [_cell(Scene(layers, backend=backend), attempt) for layers in columns]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _title(layers: Layers) -> str:
    return {str(ALL): "all", "none": "no layer"}.get(str(layers), f"{layers} alone")


def _cell(scene: Scene, attempt: Outcome) -> str:
    results = sorted(expect(scene, attempt))
    words = [f"**{result}**" if result in INTRUSIONS else result for result in results]
    return " or ".join(words)


if __name__ == "__main__":
    for backend in COLUMNS:
        print(render_table(backend))
