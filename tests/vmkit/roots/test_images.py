"""Container images by umoci and skopeo, and by hand where one should be wrong."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.vmkit.roots.archives import make_layout, make_tar, make_umoci_layout
from tests.vmkit.roots.disks import run
from vmkit.errors import BuildError, ConfigError
from vmkit.roots.images import ContainerImage, read_image
from vmkit.roots.settings import ContainerSettings
from vmkit.roots.stores import ArchiveStore, FolderStore, ImageStore
from vmkit.roots.workplace import Workplace

SETTINGS = ContainerSettings(("A=b", "PATH=/bin"), "/srv", "5:6", ("/bin/sh",), ("sh",))


@pytest.fixture(scope="module")
def umoci(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umoci")
    return make_umoci_layout(folder / "layout", folder / "work")


def convert(source: str, target: str) -> None:
    run("skopeo", "--insecure-policy", "copy", "-q", source, target)


def open_store(path: Path, place: Workplace) -> ImageStore:
    return FolderStore(path, place) if path.is_dir() else ArchiveStore(place.open(path), path.name)


def read(path: Path, place: Workplace, reference: str = "") -> ContainerImage:
    return read_image(open_store(path, place), place, reference)


def test_layout_of_umoci_has_its_configuration_and_layers(umoci: Path, place: Workplace) -> None:
    one, two = read(umoci, place, "one"), read(umoci, place, "two")
    assert one.config.settings == SETTINGS
    assert (len(one.layers), len(two.layers)) == (1, 2)
    with pytest.raises(ConfigError, match="holds 2 images") as caught:
        read(umoci, place)
    assert caught.value.details == "one\ntwo"
    with pytest.raises(ConfigError, match="holds no image 'three'"):
        read(umoci, place, "three")


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive", "oci"])
def test_what_skopeo_makes_of_it_is_the_same_image(umoci: Path, tmp_path: Path, place: Workplace, kind: str) -> None:
    path = tmp_path / "image"
    convert(f"oci:{umoci}:two", f"{kind}:{path}:me/mine:v1" if kind == "docker-archive" else f"{kind}:{path}:v1")
    image = read(path, place)
    assert image.config.diff_ids == read(umoci, place, "two").config.diff_ids
    reference = "me/mine:v1" if kind == "docker-archive" else "v1"
    assert read(path, place, reference).config == image.config
    with pytest.raises(ConfigError, match="holds no image 'v2'"):
        read(path, place, "v2")


def test_archive_of_several_images_asks_which(umoci: Path, tmp_path: Path, place: Workplace) -> None:
    """As `docker save one two` writes: two entries, and layers that both have."""
    path = tmp_path / "image.tar"
    convert(f"oci:{umoci}:two", f"docker-archive:{path}:me/mine:v1")
    convert(f"oci:{umoci}:two", f"docker-archive:{tmp_path / 'other'}:other:latest")
    store = ArchiveStore(place.open(path), "image")
    found = store.find("manifest.json")
    assert found is not None
    (entry,) = json.loads(b"".join(found.chunks()))
    pieces = [
        (name, b"".join(part.chunks())) for name in (entry["Config"], *entry["Layers"]) if (part := store.find(name))
    ]
    entries = [entry, entry | {"RepoTags": ["other:latest"]}]
    path.write_bytes(make_tar([*pieces, ("manifest.json", json.dumps(entries).encode())]))
    with pytest.raises(ConfigError, match=r"image\.tar holds 2 images") as caught:
        read(path, place)
    assert caught.value.details == "docker.io/me/mine:v1\nother:latest"
    assert read(path, place, "other").config == read(path, place, "docker.io/me/mine:v1").config


def damage(layout: Path, name: str, **changes: object) -> None:
    """Changes a document of a layout made by hand, and all digests that lead to it."""
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs/sha256"
    at = index["manifests"][0]
    manifest = json.loads((blobs / at["digest"][7:]).read_text())
    if name == "config":
        config = json.loads((blobs / manifest["config"]["digest"][7:]).read_text()) | changes
        data = json.dumps(config).encode()
        manifest["config"] |= {"digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
        (blobs / manifest["config"]["digest"][7:]).write_bytes(data)
    elif name == "manifest":
        manifest |= changes
    data = json.dumps(manifest).encode()
    at |= {"digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
    (blobs / at["digest"][7:]).write_bytes(data)
    if name == "index":
        at |= changes
    (layout / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "changes", "seen"),
    [
        ("config", {"architecture": "arm64"}, "is for linux/arm64, and the machine is linux/amd64"),
        ("config", {"os": "windows"}, "is for windows/amd64"),
        ("config", {"rootfs": {}}, "it has 1 layers, and digests of 0"),
        ("config", {"config": {"Env": "A=b"}}, "Env of configuration in .* is damaged"),
        ("config", {"config": {"Cmd": ["a\0"]}}, "Cmd of configuration in .* is damaged"),
        ("config", {"config": {"Env": ["A=\ud800"]}}, "Env of configuration in .* is damaged"),
        ("config", {"config": {"User": 5}}, "User of configuration in .* is damaged"),
        ("manifest", {"layers": [{}] * 501}, "no digest of sha256 or sha512"),
        ("manifest", {"config": {"digest": "sha256:../../etc/passwd", "size": 1}}, "no digest of sha256"),
        ("manifest", {"config": {"digest": "md5:" + "0" * 32, "size": 1}}, "no digest of sha256"),
        ("index", {"size": 5}, "bytes, not 5"),
        ("index", {"digest": "sha256:" + "0" * 64}, "lacks the blob sha256:000"),
        ("index", {"platform": "linux"}, "is no JSON object"),
    ],
)
def test_document_that_is_wrong_is_named(
    tmp_path: Path, place: Workplace, name: str, changes: dict[str, object], seen: str
) -> None:
    layout = make_layout(tmp_path / "layout", [make_tar([("bin/sh", b"x")])])
    damage(layout, name, **changes)
    with pytest.raises((BuildError, ConfigError), match=seen):
        read(layout, place)


def test_too_many_layers_are_an_error_before_any_is_read(tmp_path: Path, place: Workplace) -> None:
    layout = make_layout(tmp_path / "layout", [make_tar([("bin/sh", b"x")])] * 501)
    with pytest.raises(BuildError, match="the image has 501 layers, more than 500"):
        read(layout, place)
    hundred_thousand = [{"digest": "sha256:" + "0" * 64, "size": 1}] * 100_000
    damage(layout, "manifest", layers=hundred_thousand)
    with pytest.raises(BuildError, match=r"has more than 10000 entries|has 8388608 at most"):
        read(layout, place)


def test_document_with_another_content_is_refused(tmp_path: Path, place: Workplace) -> None:
    layout = make_layout(tmp_path / "layout", [make_tar([("bin/sh", b"x")])])
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"][7:]
    blob = layout / "blobs/sha256" / digest
    blob.write_bytes(blob.read_bytes().replace(b'"schemaVersion": 2', b'"schemaVersion": 3'))
    with pytest.raises(BuildError, match="does not match its digest"):
        read(layout, place)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\xff", "9" * 5000])
def test_document_that_is_no_json_is_refused(tmp_path: Path, place: Workplace, text: str) -> None:
    layout = make_layout(tmp_path / "layout", [])
    (layout / "index.json").write_text(text)
    with pytest.raises(BuildError, match="is damaged"):
        read(layout, place)


def test_blob_that_is_a_link_is_not_followed(tmp_path: Path, place: Workplace) -> None:
    layout = make_layout(tmp_path / "layout", [make_tar([("bin/sh", b"x")])])
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"][7:]
    blob = layout / "blobs/sha256" / digest
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="is a symbolic link"):
        read(layout, place)


def test_index_of_indexes_has_an_end(tmp_path: Path, place: Workplace) -> None:
    layout = make_layout(tmp_path / "layout", [make_tar([("bin/sh", b"x")])])
    for expected in [None] * 3 + ["its indexes lead to indexes"]:
        data = (layout / "index.json").read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / digest).write_bytes(data)
        entry = {
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }
        (layout / "index.json").write_text(json.dumps({"manifests": [entry]}))
        if expected is None:
            assert len(read(layout, place).layers) == 1
            continue
        with pytest.raises(BuildError, match=expected):
            read(layout, place)


def test_index_gives_the_image_for_the_machine(tmp_path: Path, place: Workplace) -> None:
    layout = make_layout(tmp_path / "layout", [make_tar([("bin/sh", b"x")])])
    index = json.loads((layout / "index.json").read_text())
    amd64 = index["manifests"][0] | {"platform": {"os": "linux", "architecture": "amd64"}}
    other = {"digest": "sha256:" + "0" * 64, "size": 1, "platform": {"os": "linux", "architecture": "arm64"}}
    attestation = other | {"digest": "sha256:" + "1" * 64, "platform": {"os": "unknown", "architecture": "unknown"}}
    (layout / "index.json").write_text(json.dumps({"manifests": [attestation, other, amd64]}))
    assert len(read(layout, place).layers) == 1
    (layout / "index.json").write_text(json.dumps({"manifests": [attestation, other]}))
    with pytest.raises(ConfigError, match="has no image for linux/amd64") as caught:
        read(layout, place)
    assert caught.value.details == "linux/arm64"


def test_image_is_named_as_docker_lists_it(tmp_path: Path, place: Workplace) -> None:
    """docker save, since its version 25, is a layout as well, with whole names."""
    layout = make_layout(tmp_path / "layout", [make_tar([("bin/sh", b"x")])])
    index = json.loads((layout / "index.json").read_text())
    names = {"io.containerd.image.name": "docker.io/library/debian:12", "org.opencontainers.image.ref.name": "12"}
    other = {"digest": "sha256:" + "0" * 64, "size": 1, "annotations": {"io.containerd.image.name": "other:latest"}}
    (layout / "index.json").write_text(
        json.dumps({"manifests": [index["manifests"][0] | {"annotations": names}, other]})
    )
    for reference in ("debian:12", "docker.io/library/debian:12", "12"):
        assert len(read(layout, place, reference).layers) == 1
    with pytest.raises(ConfigError, match="holds no image 'debian:13'"):
        read(layout, place, "debian:13")


def test_name_in_an_archive_leads_nowhere_else(tmp_path: Path, place: Workplace) -> None:
    path = tmp_path / "image.tar"
    entry: dict[str, object] = {"Config": "../../etc/passwd", "RepoTags": None, "Layers": []}
    path.write_bytes(make_tar([("manifest.json", json.dumps([entry]).encode())]))
    with pytest.raises(BuildError, match=r"names the file '\.\./\.\./etc/passwd', which no image has"):
        read(path, place)
    path.write_bytes(make_tar([("manifest.json", json.dumps([entry | {"Config": "missing"}]).encode())]))
    with pytest.raises(BuildError, match="lacks the document missing"):
        read(path, place)
