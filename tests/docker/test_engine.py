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
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from tests.vmkit.roots.archives import list_ext4
from vmkit.docker.container import LABEL
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
from vmkit.roots.prepare import prepare_root
from vsh.errors import VshError

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


MATRIX = """\
images = ["tiny"]
backends = ["user"]
fresh = true

[commands]
passes = "uname -r"
fails = "exit 3"
"""


def test_cell_runs_as_a_pod_of_kubernetes_does(engine: "docker.APIClient", tmp_path: Path) -> None:
    """With the arguments, environment, user, limits and read-only root of the manifest. There is no cluster here."""
    file, results = tmp_path / "matrix.toml", tmp_path / "results"
    file.write_text(MATRIX)
    file.chmod(0o644)
    tmp_path.chmod(0o755)
    results.mkdir()
    # As fsGroup makes a volume the group's.
    os.chown(results, 1000, 1000)
    words = ["matrix", "emit", "kubernetes", str(file), "--container-image", "vmkit:latest"]
    emitted = subprocess.run([sys.executable, "-m", "vmkit", *words], capture_output=True, text=True, check=True)
    _, cells, merge = yaml.safe_load_all(emitted.stdout)
    statuses = [run_pod(engine, cells, file, results, index) for index in range(cells["spec"]["completions"])]
    assert statuses == [0, 1]
    assert run_pod(engine, merge, file, results, None) == 1
    merged = json.loads((results / "merged" / "results.json").read_text())
    assert [cell["verdict"] for cell in merged["cells"]] == ["passed", "failed"]


def run_pod(engine: "docker.APIClient", job: dict[str, Any], file: Path, results: Path, index: int | None) -> int:
    """Runs the one container of a job's pod, and returns its exit status."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environ = {variable["name"]: variable["value"] for variable in container["env"]}
    if index is not None:
        environ["JOB_COMPLETION_INDEX"] = str(index)
    security, limits = container["securityContext"], container["resources"]["limits"]
    host = engine.create_host_config(
        binds=[f"{file}:/matrix/matrix.toml:ro", f"{results}:/results"],
        cap_drop=security["capabilities"]["drop"],
        security_opt=["no-new-privileges"],
        read_only=security["readOnlyRootFilesystem"],
        mem_limit=limits["memory"].replace("Mi", "m"),
        nano_cpus=int(float(limits["cpu"]) * 1e9),
        network_mode="none",
        # As an emptyDir is.
        tmpfs={"/run/vmkit": "mode=0777"},
    )
    made = engine.create_container(
        container["image"],
        [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]],
        environment=environ,
        user=f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}",
        host_config=host,
    )
    try:
        engine.start(made)
        status = engine.wait(made, timeout=DEADLINE_S)["StatusCode"]
        print(engine.logs(made).decode(errors="replace"))
        return int(status)
    finally:
        engine.remove_container(made, force=True)


@pytest.fixture
def without_skopeo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs of this host but skopeo."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in os.environ["PATH"].split(":"):
        for name in os.listdir(folder) if Path(folder).is_dir() else []:
            if name != "skopeo" and not (programs / name).is_symlink():
                (programs / name).symlink_to(Path(folder, name).absolute())
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("without_skopeo")
def test_image_of_the_engine_is_a_root(engine: "docker.APIClient") -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("srv/seen")
        member.size, member.mode = 4, 0o640
        archive.addfile(member, io.BytesIO(b"seen"))
    name = "vmkit-root-of-a-test"
    engine.import_image_from_data(packed.getvalue(), repository=name, tag="one", changes=["USER 5:6"])
    try:
        found = prepare_root(f"docker://{name}:one")
        assert (found.cached, found.settings.user) == (False, "5:6")
        assert list_ext4(found.path)["/srv/seen"] == "100640 0:0 4"
        assert prepare_root(f"docker://{name}:one").cached
        # Without a tag it is `latest`, which the engine cannot pull, with or without a network.
        with pytest.raises(VshError, match="engine"):
            prepare_root(f"docker://{name}")
    finally:
        engine.remove_image(f"{name}:one", force=True)
