"""`vmkit docker build`: a small clean context, progress, and failures that say what to do."""

from pathlib import Path

import pytest

from tests.vmkit.docker.conftest import Docker, Play
from tests.vmkit.docker.fake_engine import IMAGE
from vmkit.docker.context import find_files

CHECKOUT = Path(__file__).resolve().parents[3]
STEPS: list[dict[str, object]] = [
    {"stream": "Step 1/2 : FROM debian:trixie-slim\n"},
    {"stream": " ---> 0123456789ab\n"},
    {"stream": "Step 2/2 : RUN /usr/local/lib/vmkit-docker/install python3\n"},
    {"stream": " ---> Running in 0123456789ab\n"},
]
DONE: dict[str, object] = {"aux": {"ID": IMAGE}}


def failed(text: str) -> dict[str, object]:
    return {"error": text, "errorDetail": {"message": text}}


def test_build_tells_steps_and_the_image(play: Play, docker: Docker) -> None:
    engine = play(build=[*STEPS, DONE])
    done = docker("build", str(CHECKOUT), "--target", "test", "--base", "debian:sid", "--network", "host")
    assert done.returncode == 0, done.stderr
    assert b"vmkit:test is built: abababababab, 426 MB" in done.stdout
    assert b"Step 2/2" in done.stderr
    assert engine.build_query["target"] == ["test"]
    assert engine.build_query["networkmode"] == ["host"]
    assert engine.build_query["buildargs"] == ['{"BASE": "debian:sid"}']
    assert engine.build_query["forcerm"] == ["True"]


def test_context_is_small_and_clean(play: Play, docker: Docker) -> None:
    engine = play(build=[*STEPS, DONE])
    docker("build", str(CHECKOUT))
    assert {"Dockerfile", "vmkit/__main__.py", "tests/conftest.py", "requirements/run.lock"} <= set(engine.context)
    assert not [name for name in engine.context if "__pycache__" in name or name.startswith((".git/", ".venv"))]
    assert sum((CHECKOUT / name).stat().st_size for name in find_files(CHECKOUT)) < 16 << 20


def test_context_that_grew(play: Play, docker: Docker, tmp_path: Path) -> None:
    play()
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    with (tmp_path / "disk.img").open("wb") as disk:
        disk.truncate(100 << 20)
    done = docker("build", str(tmp_path))
    assert done.returncode == 64
    assert b"at 'disk.img' it was too much" in done.stderr


def test_no_checkout(docker: Docker, tmp_path: Path) -> None:
    done = docker("build", str(tmp_path))
    assert done.returncode == 64
    assert b"holds no Dockerfile" in done.stderr


@pytest.mark.parametrize(
    ("messages", "status", "brief", "hint"),
    [
        (
            [*STEPS, {"stream": "E: broken\n"}, failed("The command '/bin/sh -c x' returned a non-zero code: 100")],
            1,
            "the build failed at Step 2/2 : RUN /usr/local/lib/vmkit-docker/install python3",
            "build again",
        ),
        (
            [
                *STEPS,
                {"stream": "\x1b[91mvmkit-docker: error: the base image is Alpine Linux v3.20, and Debian is needed\n"},
                {"stream": "vmkit-docker: hint: build on debian:trixie-slim: --base debian:trixie-slim\n"},
                failed("The command '/bin/sh -c x' returned a non-zero code: 3"),
            ],
            64,
            "the image cannot be built: the base image is Alpine Linux v3.20",
            "--base debian:trixie-slim",
        ),
        ([*STEPS, failed("write /var/lib/docker/tmp/x: no space left on device")], 1, "disk is full", "system prune"),
        (
            [
                STEPS[0],
                failed("pull access denied for nonsuch, repository does not exist or may require 'docker login'"),
            ],
            64,
            "the engine cannot find the base image",
            "--base IMAGE",
        ),
        (
            [
                STEPS[0],
                failed('Get "https://registry-1.docker.io/v2/": dial tcp: lookup registry-1.docker.io: no such host'),
            ],
            1,
            "the engine cannot reach the registry",
            "without a network, name a base",
        ),
        (
            [
                *STEPS,
                {"stream": "\x1b[91mErr:1 Temporary failure resolving 'deb.debian.org'\x1b[0m\n"},
                failed("code: 1"),
            ],
            1,
            "the build has no network: Step 2/2",
            "--network host",
        ),
        (STEPS, 1, "the engine ended the build without a message", "docker info"),
    ],
    ids=["step", "base", "disk", "no-base", "no-registry", "no-network", "silence"],
)
def test_build_that_fails(
    play: Play, docker: Docker, messages: list[dict[str, object]], status: int, brief: str, hint: str
) -> None:
    play(build=messages)
    done = docker("build", str(CHECKOUT), "--quiet")
    assert done.returncode == status
    assert brief in done.stderr.decode()
    assert hint in done.stderr.decode()


def test_engine_that_dies_in_the_middle(play: Play, docker: Docker) -> None:
    play(build=STEPS, build_dies=True)
    done = docker("build", str(CHECKOUT), "--quiet")
    assert done.returncode == 1
    assert b"vmkit: " in done.stderr and b"Traceback" not in done.stderr
    assert b"docker info" in done.stderr
