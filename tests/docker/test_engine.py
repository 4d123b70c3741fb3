"""Our Docker images on a real engine: what the images hold, how containers end, and that two builds are the same."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
import pytest

from vmkit.docker.container import LABEL
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image

DEADLINE_S = 600
MAX_RUN_STAGE_BYTES = 700_000_000
BUILD_ARGUMENTS = ["--base", os.environ["VMKIT_DOCKER_BASE"]]
if os.environ.get("VMKIT_DOCKER_NETWORK"):
    BUILD_ARGUMENTS += ["--network", os.environ["VMKIT_DOCKER_NETWORK"]]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vmkit", "docker", *words]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*words), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DEADLINE_S, check=False
    )


@pytest.fixture(scope="module")
def engine() -> Iterator["docker.APIClient"]:
    client = docker.APIClient(base_url=os.environ.get("DOCKER_HOST"), version="auto", timeout=DEADLINE_S)
    yield client
    client.close()


def test_run_stage_is_small(engine: "docker.APIClient") -> None:
    assert engine.inspect_image("vmkit:latest")["Size"] <= MAX_RUN_STAGE_BYTES


def test_container_is_nobody_special(engine: "docker.APIClient") -> None:
    done = run("run", "--", "sh", "-c", "id -u; grep CapEff /proc/self/status; ls /sys/class/net")
    assert done.stdout.split() == ["1000", "CapEff:", "0000000000000000", "lo"]


def test_every_debian_package_is_recorded() -> None:
    listed = run("run", "--", "cat", "/usr/share/vmkit-docker/packages").stdout.splitlines()
    installed = run(
        "run", "--", "dpkg-query", "-W", "-f", "${Package} ${Version} ${Architecture}\\n"
    ).stdout.splitlines()
    assert listed == installed
    assert any(line.startswith("qemu-system-x86 ") for line in listed)


def take_recipe(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of its image without the versions of packages."""
    of_versions = {"digest", "kernel_version", "artifacts", "packages"}
    kept = {key: value for key, value in manifest.items() if key not in of_versions}
    return {**kept, "names": {package["name"] for package in manifest["packages"]}}


def test_tiny_is_the_same_inside_and_outside() -> None:
    inside = json.loads(run("run", "--", "sh", "-c", "cat ~/.cache/vmkit/images/*/manifest.json").stdout)
    outside = json.loads(build_image(load_image("tiny")).manifest.read_text())
    # The archive may have moved on between the two; the recipe is still one.
    assert take_recipe(inside) == take_recipe(outside)
    if inside["packages"] == outside["packages"]:
        assert inside == outside


@contextmanager
def sleeping(engine: "docker.APIClient") -> Iterator["subprocess.Popen[bytes]"]:
    words = command("run", "--", "sh", "-c", "echo up; exec sleep 600")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        assert len(engine.containers(filters={"label": LABEL})) == 1
        yield client


def test_interruption_leaves_no_container(engine: "docker.APIClient") -> None:
    with sleeping(engine) as client:
        client.send_signal(signal.SIGINT)
        client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 128 + signal.SIGINT
    assert engine.containers(all=True, filters={"label": LABEL}) == []


def test_killed_client_leaves_no_running_container(engine: "docker.APIClient") -> None:
    with sleeping(engine) as client:
        (container,) = engine.containers(filters={"label": LABEL})
        client.kill()
    assert engine.wait(container["Id"], timeout=60)["StatusCode"] == 128 + signal.SIGTERM
    assert "removed the container" in run("run", "--", "true").stderr
    assert engine.containers(all=True, filters={"label": LABEL}) == []


def test_two_builds_hold_the_same_files(engine: "docker.APIClient") -> None:
    """Built again from nothing, on another day: every file, mode, owner and link is the same; times are not asked."""
    done = run("build", "--no-cache", "--quiet", "--tag", "vmkit:again", *BUILD_ARGUMENTS)
    assert done.returncode == 0, done.stderr
    try:
        first, second = files_of(engine, "vmkit:latest"), files_of(engine, "vmkit:again")
    finally:
        engine.remove_image("vmkit:again", force=True)
    different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    assert different == []


def files_of(engine: "docker.APIClient", image: str) -> dict[str, tuple[object, ...]]:
    """Every file of an image: what it is, whose, and what is in it."""
    container = engine.create_container_from_config({"Image": image, "Cmd": ["true"]})["Id"]
    files: dict[str, tuple[object, ...]] = {}
    try:
        stream = io.BufferedReader(Chunks(engine.export(container)), 1 << 20)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isfile() else None
                content = hash(source.read()) if source else member.linkname
                files[member.name] = (member.type, member.mode, member.uid, member.gid, content)
    finally:
        engine.remove_container(container)
    return files


class Chunks(io.RawIOBase):
    """An iterator of bytes as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]  # typeshed wants any buffer
        self._left = self._left or next(self._chunks, b"")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
