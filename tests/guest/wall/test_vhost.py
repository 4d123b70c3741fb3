"""The wall over the kernel's own vhost-vsock, in a host VM that vmkit runs (image `nested`).

Two guests, one after another: the first has every layer and stays, a sibling for the second, which has none. The host
VM's users are what `vhost` adds: the kernel lets every one of them connect to a guest. And the host VM is a guest
itself, with a vshd of its own, so that these two are nested guests to it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest.nested import INNER_TIMEOUT_S, NAME, NestedHost
from tests.guest.wall.ledger import LEDGER
from tests.guest.wall.scene import (
    ALL,
    ATTACK_TIMEOUT_S,
    INSIDE,
    NONE,
    Scene,
    plan_scenes,
    write_recipe,
)
from tests.guest.wall.storm import storm
from vmkit.image.build import build_image
from vmkit.image.cache import Cache, find_cache_dir
from vmkit.image.debian.packages import make_request
from vmkit.image.recipe.config import load_image
from vmkit.image.wall.spec import LOOPBACK_MODULE
from vsh.client import Result
from vsh.registry import find_machine

# Each is one of the CIDs that the other tries; those of `make wall-full` come one by one to the third.
CIDS = {ALL: 3, NONE: 4}
OTHER_CID = 5
GUEST_CACHE = "/root/.cache/vmkit"
FOLDER = "/srv/wall-test"
PATIENCE = "--connect_timeout=100"
OTHER_USER = 1000


@dataclass(frozen=True, slots=True)
class Guest:
    """An inner guest, reached from the host VM over AF_VSOCK."""

    host: NestedHost
    scene: Scene
    cid: int

    def run(self, argv: Sequence[str], *, user: str = "root", timeout: float | None = None) -> Result[bytes]:
        """Runs a command in it, as vmkit.Machine.run does."""
        words = ("vsh", PATIENCE, "--cid", str(self.cid), f"--user={user}", "--", *argv)
        return self.host.run(*words, timeout_s=timeout or ATTACK_TIMEOUT_S)


@pytest.fixture(scope="module")
def host(nested_host: NestedHost) -> Iterator[NestedHost]:
    """The host VM, without machines at the end."""
    nested_host.put(INSIDE, f"{FOLDER}/inside")
    yield nested_host
    nested_host.end_machines()


@pytest.fixture(scope="module", params=plan_scenes("vhost"), ids=str)
def guest(
    request: pytest.FixtureRequest, host: NestedHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """A ready guest of a scene in the host VM. The first two stay for each other."""
    scene: Scene = request.param
    is_staying = (scene.image, scene.kernel) == ("tiny", "6.12") and scene.layers in CIDS
    cid = CIDS[scene.layers] if is_staying else OTHER_CID
    digest = start_guest(host, scene, cid, tmp_path_factory.mktemp("recipe"))
    yield Guest(host, scene, cid)
    if not is_staying:
        host.check("vmkit", "kill", name_of(scene))
        # The host VM's disk is its memory, and each set of layers is an image of its own.
        host.check("rm", "-r", f"{GUEST_CACHE}/images/{digest}")


def name_of(scene: Scene) -> str:
    return f"{scene.image}-{scene.layers}-{scene.kernel}"


def start_guest(host: NestedHost, scene: Scene, cid: int, folder: Path) -> str:
    """The digest of its image."""
    recipe, digest = ship_image(host, scene, folder)
    words = ["vmkit", "up", recipe, "--backend", "vhost", "--cid", str(cid), "--name", name_of(scene)]
    result = host.run(*words, "--timeout", str(INNER_TIMEOUT_S), timeout_s=INNER_TIMEOUT_S + 60)
    assert result.exit == 0, result.stderr.decode()
    return digest


def ship_image(host: NestedHost, scene: Scene, folder: Path) -> tuple[str, str]:
    """Builds here, and puts recipe, image and package lock where vmkit finds them there: the digest is the same.

    The recipe's path there, and the digest.
    """
    recipe = write_recipe(scene, folder)
    spec = load_image(str(recipe))
    built = build_image(spec)
    lock = Cache(find_cache_dir()).lock_path(make_request(spec).key())
    host.put(built.kernel.parent, f"{GUEST_CACHE}/images/{built.digest}")
    host.put(lock, f"{GUEST_CACHE}/resolved/{lock.name}")
    recipe.write_text(recipe.read_text().replace(str(INSIDE), f"{FOLDER}/inside"))
    host.put(recipe, f"{FOLDER}/{recipe.name}")
    return f"{FOLDER}/{recipe.name}", built.digest


def test_host_vm_is_a_plain_host(host: NestedHost) -> None:
    """Whatever other tests did there: its own layers are up, and nothing connects it to itself."""
    machine = find_machine(name=NAME)
    assert machine is not None
    assert machine.record["wall"] == {"transport": "on", "daemon": "on", "kernel": "on"}
    assert LOOPBACK_MODULE not in host.check("cat", "/proc/modules")


def test_every_attempt_ends_as_the_table_says(guest: Guest) -> None:
    command_line = guest.run(["cat", "/proc/cmdline"]).stdout.decode()
    ready_port = int(command_line.partition("vmkit.ready=")[2].split()[0])
    storm(guest, guest.scene, guest.cid, ready_port)


def test_other_user_of_the_host_needs_the_token(guest: Guest) -> None:
    """The kernel connects everybody; the token, which no other user can read, is what is asked for."""
    as_other = ("setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups", "env", "HOME=/tmp")
    token = f"--token_file=/tmp/vmkit-0/machines/{name_of(guest.scene)}/token"
    results = {}
    for flag in ("--extended", "--noextended", token):
        words = (*as_other, "vsh", PATIENCE, flag, "--cid", str(guest.cid), "--", "id", "-u")
        result = guest.host.run(*words, timeout_s=ATTACK_TIMEOUT_S)
        results[flag] = (result.exit, result.stdout, result.stderr)
    intrusions = sum(stdout == b"0\n" for _, stdout, _ in results.values())
    is_guarded = guest.scene.layers.token
    where = f"another user of the host, {guest.scene}"
    LEDGER.add(where, len(results), intrusions, is_guarded=is_guarded)
    if is_guarded:
        assert intrusions == 0, results
    else:
        # The image allows legacy clients: whoever speaks ChromeOS's protocol is in.
        assert results["--noextended"][:2] == (0, b"0\n"), results


def test_host_vm_s_own_vshd_hung_up_on_its_nested_guests(guest: Guest) -> None:
    lines = [line for line in guest.host.check("dmesg").splitlines() if "vshd: vsock " in line]
    served = [line for line in lines if "refused" not in line and "vshd: vsock 2:" not in line]
    assert served == []
