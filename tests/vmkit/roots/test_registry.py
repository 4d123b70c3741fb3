"""Images from Debian's registry server on loopback, by skopeo, and each of its refusals as a user meets it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vmkit.roots.archives import list_ext4, make_umoci_layout
from tests.vmkit.roots.disks import run
from vmkit.errors import HostError
from vmkit.roots.prepare import prepare_root
from vmkit.roots.refusals import explain_refusal, find_registry

# `make test-packages` unpacks it here: installed, Debian's package would start it for everybody.
UNPACKED = Path(sys.prefix) / "packages/usr/bin"
READY_S = 60.0
# `htpasswd -nbB ann secret`.
ANN = "ann:$2b$05$sNNE0RKS5oen9uaK19XhyOmTPRvMwEl9xt/pkmupRt7F5HVAj7PPa"


@contextmanager
def serve_registry(folder: Path, *, has_login: bool = False) -> Iterator[str]:
    """A registry whose images are in the folder. Yields its address on loopback."""
    program = shutil.which("docker-registry", path=f"{UNPACKED}:{os.environ['PATH']}")
    assert program is not None, "the package docker-registry is missing: make test-packages"
    folder.mkdir()
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"formatter": "json", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "images")}},
        "http": {"addr": "127.0.0.1:0"},
    }
    if has_login:
        (folder / "users").write_text(f"{ANN}\n")
        config["auth"] = {"htpasswd": {"realm": "vmkit", "path": str(folder / "users")}}
    # YAML holds all of JSON.
    (folder / "config.yml").write_text(json.dumps(config))
    words = [program, "serve", str(folder / "config.yml")]
    # The server takes these for its settings, and skopeo one of them for its own.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ) as server:
        # Ends the reading below, should the server never say where it listens.
        timer = threading.Timer(READY_S, server.kill)
        timer.start()
        assert server.stderr is not None
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                found = re.search(r"listening on (127\.0\.0\.1:\d+)", line)
                if found:
                    break
            else:
                pytest.fail(f"docker-registry does not start: {''.join(lines)}")
            timer.cancel()
            # It may log more than a pipe holds.
            reader = threading.Thread(target=server.stderr.read)
            reader.start()
            try:
                yield found[1]
            finally:
                server.kill()
                reader.join()
        finally:
            timer.cancel()
            server.kill()


def push(layout: Path, tag: str, image: str, *words: str) -> None:
    target = f"docker://{image}"
    run("skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", *words, f"oci:{layout}:{tag}", target)


@pytest.fixture(scope="module")
def umoci(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umoci")
    return make_umoci_layout(folder / "layout", folder / "work")


@pytest.fixture(scope="module")
def registry(umoci: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that has me/mine:two."""
    with serve_registry(tmp_path_factory.mktemp("registry") / "data") as address:
        push(umoci, "two", f"{address}/me/mine:two")
        yield address


@pytest.fixture(autouse=True)
def _no_config_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user of this host allows, and where the user is logged in, is not the tests'."""
    (tmp_path / ".config/containers").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "auth.json").write_text("{}")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")


def test_image_of_a_registry_is_the_one_that_was_pushed(registry: str, umoci: Path) -> None:
    """By its tag and by its digest; and it is one disk with what umoci made."""
    found = prepare_root(f"docker://{registry}/me/mine:two")
    assert not found.cached
    assert {"/bin/sh", "/srv/new"} <= list_ext4(found.path).keys()
    assert prepare_root(f"oci:{umoci}:two") == replace(found, cached=True)
    words = ["skopeo", "inspect", "--tls-verify=false", f"docker://{registry}/me/mine:two"]
    digest = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)["Digest"]
    assert prepare_root(f"docker://{registry}/me/mine@{digest}") == replace(found, cached=True)


@pytest.mark.parametrize("image", ["me/mine:three", "not/here:two"])
def test_image_that_a_registry_lacks_is_named(registry: str, image: str) -> None:
    with pytest.raises(HostError) as caught:
        prepare_root(f"docker://{registry}/{image}")
    assert caught.value.brief == f"the registry {registry} has no image {registry}/{image}"
    repository = image.partition(":")[0]
    assert caught.value.hint == f"check the name and the tag: skopeo list-tags docker://{registry}/{repository}"


def test_registry_that_asks_for_a_login_gets_that_of_skopeo(
    umoci: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_registry(tmp_path / "private", has_login=True) as address:
        push(umoci, "one", f"{address}/me/mine:one", "--dest-creds", "ann:secret")
        with pytest.raises(HostError) as caught:
            prepare_root(f"docker://{address}/me/mine:one")
        assert caught.value.brief == f"the registry {address} does not give {address}/me/mine:one without a login"
        assert caught.value.hint == f"check the name, or log in: skopeo login {address}"
        # What `skopeo login` writes.
        word = base64.b64encode(b"ann:secret").decode()
        (tmp_path / "auth.json").write_text(json.dumps({"auths": {address: {"auth": word}}}))
        found = prepare_root(f"docker://{address}/me/mine:one")
    assert found.settings.user == "5:6"


def test_plain_http_of_another_host_must_be_allowed(registry: str, tmp_path: Path) -> None:
    """Its name is no loopback address, whatever is behind it."""
    other = registry.replace("127.0.0.1", "0.0.0.0")
    with pytest.raises(HostError) as caught:
        prepare_root(f"docker://{other}/me/mine:two")
    assert caught.value.brief == (
        f"the registry {other} speaks plain HTTP, which vmkit takes from registries of this host alone"
    )
    assert f'location = "{other}", insecure = true' in caught.value.hint
    allowed = tmp_path / ".config/containers/registries.conf"
    allowed.write_text(f'[[registry]]\nlocation = "{other}"\ninsecure = true\n')
    assert prepare_root(f"docker://{other}/me/mine:two").key == prepare_root(f"docker://{registry}/me/mine:two").key


@pytest.mark.parametrize(
    ("text", "reference", "brief", "hint"),
    [
        (
            'Get "https://registry-1.docker.io/v2/": dial tcp: lookup registry-1.docker.io on [::1]:53: '
            "read udp [::1]:1->[::1]:53: read: connection refused",
            "debian:stable",
            "this host cannot find the address of the registry docker.io",
            "check the name and the network; without one, take an archive: docker save IMAGE | vmkit up -",
        ),
        (
            "reading manifest latest in docker.io/library/myapp: requested access to the resource is denied",
            "myapp",
            "the registry docker.io does not give myapp without a login",
            "check the name, or log in: skopeo login docker.io; for an image of your Docker engine: "
            "docker save myapp | vmkit up -",
        ),
        (
            'Get "https://r.example/v2/": x509: certificate signed by unknown authority',
            "r.example/app@sha256:00",
            "this host does not trust the certificate of the registry r.example",
            "put the certificate of its authority into /etc/containers/certs.d/r.example/ca.crt",
        ),
        (
            'Error choosing image instance: no image found in manifest list for architecture arm64, variant "v8"',
            "r.example:5000/app:1",
            "r.example:5000/app:1 has no image for this architecture",
            "choose another image, or another machine: --arch",
        ),
        (
            'pinging container registry r.example: Get "https://r.example/v2/": dial tcp 192.0.2.1:443: i/o timeout',
            "r.example/app",
            "the registry r.example cannot be reached",
            "check the network, and the variables for a proxy: HTTPS_PROXY, NO_PROXY",
        ),
        (
            "something new",
            "r.example/app",
            "skopeo cannot get the image: 'skopeo' failed with status 1",
            "check the name and the network; for a registry that asks who you are: skopeo login",
        ),
    ],
)
def test_refusal_names_the_registry_and_the_remedy(text: str, reference: str, brief: str, hint: str) -> None:
    found = explain_refusal(text, reference, "'skopeo' failed with status 1")
    assert (found.brief, found.hint) == (brief, hint)


@pytest.mark.parametrize(
    ("reference", "registry"),
    [
        ("debian", "docker.io"),
        ("debian:stable", "docker.io"),
        ("me/mine:1", "docker.io"),
        ("localhost/mine", "localhost"),
        ("r.example/mine", "r.example"),
        ("[::1]:5000/mine", "[::1]:5000"),
        ("host:5000/a/b@sha256:00", "host:5000"),
    ],
)
def test_registry_is_the_first_word_that_can_be_a_host(reference: str, registry: str) -> None:
    assert find_registry(reference) == registry
