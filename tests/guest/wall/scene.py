"""Where an attack takes place: which layers are up, on which image, kernel and backend, and a guest made of that.

A scene is a value; `render_recipe` turns it into a recipe with the attacker in it, `open_scene` boots it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from vmkit.machine.machine import Machine
from vsh.client import Result

INSIDE = Path(__file__).parent / "inside"
IN_GUEST = "/srv/wall"
RECORDS = "/run/wall"
ATTACKER = ("python3", "-I", "-S", f"{IN_GUEST}/attacker.py")
# 6.1 is Debian 12's kernel, 6.12 Debian 13's.
IMAGES = ("tiny", "debian")
KERNEL_SUITES = {"6.12": "trixie", "6.1": "bookworm"}
CID = 40
USER_READY_PORT = 7777
# A guest of a guest may take this long; others take seconds.
ATTACK_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of an image's [wall]. token: clients that cannot prove the machine's token are refused (`vhost`)."""

    transport: bool = True
    daemon: bool = True
    kernel: bool = True
    token: bool = True

    def __str__(self) -> str:
        names = [name for name in self.__slots__ if getattr(self, name)]
        return {0: "none", len(self.__slots__): "all"}.get(len(names), "+".join(names))


ALL = Layers()
NONE = Layers(transport=False, daemon=False, kernel=False, token=False)
TRANSPORT, DAEMON, KERNEL, TOKEN = (replace(NONE, **{name: True}) for name in Layers.__slots__)
# On `user` no machine has a token unless it is asked for.
MATRIX = (NONE, TRANSPORT, DAEMON, KERNEL, ALL)


@dataclass(frozen=True, slots=True)
class Scene:
    """One guest under attack."""

    layers: Layers
    image: str = "tiny"
    kernel: str = "6.12"
    backend: str = "user"

    def __str__(self) -> str:
        return f"{self.image}-{self.kernel}-{self.backend}-{self.layers}"


# `make wall-full` sets it to the file that the table of the run is written to.
FULL_TABLE = os.environ.get("VMKIT_WALL_FULL", "")


def plan_scenes(backend: str, *, is_full: bool = bool(FULL_TABLE)) -> list[Scene]:
    """The scenes of every run, or of `make wall-full`: images by kernels by sets of layers."""
    kernels = tuple(KERNEL_SUITES)
    if is_full:
        sets = (*MATRIX, TOKEN) if backend == "vhost" else MATRIX
        return [Scene(layers, image, kernel, backend) for image in IMAGES for kernel in kernels for layers in sets]
    if backend == "vhost":
        return [Scene(layers, backend=backend) for layers in (ALL, NONE)]
    scenes = [Scene(layers, kernel=kernel) for kernel in kernels for layers in MATRIX]
    return scenes + [Scene(layers, image="debian") for layers in (ALL, NONE)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One attempt and how it ended, as the attacker prints it. seconds: how long it took."""

    attempt: str
    who: str
    uid: int
    phase: str
    type: str
    cid: str
    port: int
    source: str
    result: str
    seconds: float


def render_recipe(scene: Scene) -> str:
    """The scene's image with the attacker, its hook, and vsock_loopback on the disk for whoever can load it."""
    switches = {name: getattr(scene.layers, name) for name in ("transport", "daemon", "kernel")}
    switches["legacy_clients"] = not scene.layers.token
    wall = "\n".join(f"{name} = {str(is_on).lower()}" for name, is_on in switches.items())
    files = "\n".join(f'"{IN_GUEST}/{path.name}" = {{ source = "{path}" }}' for path in sorted(INSIDE.glob("*.py")))
    return f"""\
extends = "{scene.image}"
description = "an image under attack"
kernel_suite = "{KERNEL_SUITES[scene.kernel]}"
modules_available = ["vsock_loopback"]

[wall]
{wall}

[hook]
content = '''
#!/bin/sh
exec python3 -I -S {IN_GUEST}/attacker.py boot {RECORDS}
'''

[files]
{files}
"""


def write_recipe(scene: Scene, folder: Path) -> Path:
    path = folder / f"wall-{scene.image}-{str(scene.layers).replace('+', '-')}-{scene.kernel}.toml"
    path.write_text(render_recipe(scene))
    return path


@contextmanager
def open_scene(scene: Scene, folder: Path, *, name: str = "wall", cid: int = CID) -> Iterator[Machine]:
    """A ready guest of the scene, killed at the end."""
    with Machine(
        str(write_recipe(scene, folder)), name=name, cid=cid, accelerator="tcg", backend=scene.backend
    ) as machine:
        yield machine


class Target(Protocol):
    """A guest that can be told to run a command: a vmkit.Machine, or one in another guest."""

    def run(self, argv: Sequence[str], *, user: str = "root", timeout: float | None = None) -> Result[bytes]: ...


def attack(target: Target, who: str, *words: str) -> list[Outcome]:
    """Runs one order of the attacker in the guest as `who`."""
    user = "root" if who == "root" else "user"
    result = target.run(
        [*ATTACKER, words[0], who, *words[1:]],
        user=user, timeout=ATTACK_TIMEOUT_S,
    )  # fmt: skip
    assert result.exit == 0, result.stderr.decode()
    return read_outcomes(result.stdout.decode())


def read_outcomes(text: str) -> list[Outcome]:
    return [Outcome(**json.loads(line)) for line in text.splitlines()]
