"""Container images: an OCI layout or a `docker save` archive becomes a configuration and a list of layers.

Facts are those of the OCI image specification (image-layout.md, image-index.md, manifest.md) and of docker's image
specification 1.2. A document is believed only when its digest is the one that led to it.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmkit.errors import BuildError, ConfigError
from vmkit.roots.extents import Extent
from vmkit.roots.settings import ImageConfig, parse_config, parse_json, take_list, take_mapping, take_text, take_texts
from vmkit.roots.stores import ImageStore
from vmkit.roots.workplace import Workplace

_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")
_REF_NAME = "org.opencontainers.image.ref.name"
# containerd and docker keep the whole name here, and the tag alone in the one above.
_WHOLE_NAME = "io.containerd.image.name"
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
# An index of indexes is a rarity, and a deeper one a trap.
_DEPTH_LIMIT = 4
_LISTED = 20
# What registries call the machines that vmkit's users call otherwise.
_ARCHITECTURES = {"amd64": ("amd64", "x86_64", "x86-64"), "arm64": ("arm64", "aarch64")}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer where it is. digest: what its bytes there must have, empty where only the unpacked ones have one."""

    archive: Extent
    name: str
    digest: str
    diff_id: str


@dataclass(frozen=True, slots=True)
class ContainerImage:
    """A configuration whose digest is right, and its layers, the lowest first, not looked into yet."""

    config: ImageConfig
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class _Descriptor:
    digest: str
    size_bytes: int
    media_type: str
    platform: tuple[str, str]
    names: tuple[str, ...]


def read_image(store: ImageStore, place: Workplace, reference: str = "", architecture: str = "amd64") -> ContainerImage:
    """Finds the image in a layout or an archive. reference: which, where there are several.

    Raises ConfigError where the choice is open or the image is for another machine, BuildError for a damaged one.
    """
    if store.find("index.json") is not None:
        return _read_layout(store, place, reference, architecture)
    if store.find("manifest.json") is not None:
        return _read_docker(store, place, reference, architecture)
    raise ConfigError(
        f"{store.name} is no container image: it has neither index.json nor manifest.json",
        hint="give an OCI layout, or what docker save has written",
    )


# OCI


def _read_layout(store: ImageStore, place: Workplace, reference: str, architecture: str) -> ContainerImage:
    data = _read_document(store, "index.json", place)
    descriptors = _read_descriptors(parse_json(data, f"index.json of {store.name}"), store.name)
    descriptor = _choose_by_name(descriptors, reference, architecture, store.name)
    for _ in range(_DEPTH_LIMIT):
        document = _read_blob_document(store, descriptor, place)
        if descriptor.media_type not in _INDEX_TYPES and "manifests" not in document:
            return _read_manifest(store, document, place, architecture)
        descriptor = _choose_by_platform(_read_descriptors(document, store.name), architecture, store.name)
    raise BuildError(f"{store.name} is damaged: its indexes lead to indexes and to no image")


def _read_manifest(
    store: ImageStore, document: Mapping[str, object], place: Workplace, architecture: str
) -> ContainerImage:
    what = f"manifest in {store.name}"
    config_at = _read_descriptor(document.get("config"), what)
    layers_at = [_read_descriptor(entry, what) for entry in take_list(document.get("layers"), what)]
    place.budget.take_layers(len(layers_at))
    config = parse_config(_read_blob(store, config_at, place), f"configuration in {store.name}")
    _check(config, len(layers_at), architecture, store.name)
    layers = []
    for descriptor, diff_id in zip(layers_at, config.diff_ids, strict=True):
        if descriptor.media_type.endswith("+encrypted"):
            raise ConfigError(f"{store.name} is encrypted", hint="decrypt it with skopeo copy --decryption-key")
        archive = _find_blob(store, descriptor)
        layers.append(Layer(archive, f"layer {descriptor.digest[:19]} of {store.name}", descriptor.digest, diff_id))
    return ContainerImage(config, tuple(layers))


def _read_descriptors(document: object, name: str) -> list[_Descriptor]:
    entries = take_list(take_mapping(document, f"index of {name}").get("manifests"), f"index of {name}")
    return [_read_descriptor(entry, f"index of {name}") for entry in entries]


def _read_descriptor(value: object, name: str) -> _Descriptor:
    entry = take_mapping(value, name)
    digest, size = entry.get("digest"), entry.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise BuildError(f"the {name} is damaged: it has no digest of sha256 or sha512")
    if not isinstance(size, int) or size < 0:
        raise BuildError(f"the {name} is damaged: it gives no size")
    platform = take_mapping(entry.get("platform") or {}, name)
    notes = take_mapping(entry.get("annotations") or {}, name)
    names = tuple(text for key in (_REF_NAME, _WHOLE_NAME) if isinstance(text := notes.get(key), str))
    return _Descriptor(
        digest,
        size,
        take_text(entry.get("mediaType") or "", name),
        (take_text(platform.get("os") or "", name), take_text(platform.get("architecture") or "", name)),
        names,
    )


def _choose_by_name(found: list[_Descriptor], reference: str, architecture: str, name: str) -> _Descriptor:
    fitting = [
        descriptor
        for descriptor in found
        # docker save writes whole names, and users name images as docker lists them.
        if not reference or reference in descriptor.names or _complete(reference) in map(_complete, descriptor.names)
    ]
    if not fitting:
        raise _explain_choice(f"{name} holds no image '{reference}'", [text for one in found for text in one.names])
    if len({descriptor.digest for descriptor in fitting}) == 1:
        return fitting[0]
    if any(descriptor.platform != ("", "") for descriptor in fitting):
        # Several machines' images may stand beside each other, without an index between.
        return _choose_by_platform(fitting, architecture, name)
    raise _explain_choice(f"{name} holds {len(fitting)} images", [text for one in fitting for text in one.names])


def _explain_choice(brief: str, names: Sequence[str]) -> ConfigError:
    listed = "\n".join(names[:_LISTED])
    return ConfigError(brief, details=listed, hint="name one after a colon: oci:PATH:TAG, docker-archive:PATH:NAME:TAG")


def _choose_by_platform(found: list[_Descriptor], architecture: str, name: str) -> _Descriptor:
    """The one for this machine. What has no known platform is an attestation beside the images."""
    for descriptor in found:
        if descriptor.platform == ("linux", architecture) or len(found) == 1:
            return descriptor
    platforms = sorted({"/".join(descriptor.platform) for descriptor in found} - {"/", "unknown/unknown"})
    raise ConfigError(
        f"{name} has no image for linux/{architecture}",
        details="\n".join(platforms[:_LISTED]),
        hint="choose an image that was built for this architecture, too",
    )


def _find_blob(store: ImageStore, descriptor: _Descriptor) -> Extent:
    algorithm, _, digest = descriptor.digest.partition(":")
    blob = store.find(f"blobs/{algorithm}/{digest}")
    if blob is None:
        raise BuildError(f"{store.name} lacks the blob {descriptor.digest}", hint="copy it again: skopeo copy")
    if blob.size_bytes != descriptor.size_bytes:
        raise BuildError(
            f"the blob {descriptor.digest} of {store.name} has {blob.size_bytes} bytes, not {descriptor.size_bytes}",
            hint="copy it again: skopeo copy",
        )
    return blob


def _read_blob(store: ImageStore, descriptor: _Descriptor, place: Workplace) -> bytes:
    data = _read_limited(_find_blob(store, descriptor), f"the blob {descriptor.digest} of {store.name}", place)
    algorithm, _, digest = descriptor.digest.partition(":")
    if hashlib.new(algorithm, data).hexdigest() != digest:
        raise explain_digest(f"blob {descriptor.digest} of {store.name}")
    return data


def _read_blob_document(store: ImageStore, descriptor: _Descriptor, place: Workplace) -> Mapping[str, object]:
    name = f"manifest in {store.name}"
    return take_mapping(parse_json(_read_blob(store, descriptor, place), name), name)


def explain_digest(name: str) -> BuildError:
    """The error for bytes that are not those that a digest was made of."""
    return BuildError(
        f"the {name} does not match its digest", hint="the file was changed, or its copy is not whole: copy it again"
    )


# docker save


def _read_docker(store: ImageStore, place: Workplace, reference: str, architecture: str) -> ContainerImage:
    what = f"manifest.json of {store.name}"
    entries = [
        take_mapping(entry, what)
        for entry in take_list(parse_json(_read_document(store, "manifest.json", place), what), what)
    ]
    entry = _choose_by_tag(entries, reference, store.name)
    names = take_texts(entry.get("Layers"), what)
    place.budget.take_layers(len(names))
    config_name = take_text(entry.get("Config"), what)
    data = _read_document(store, config_name, place)
    # Named by its digest: HEX.json, or blobs/sha256/HEX since docker 25.
    digest = re.search(r"([0-9a-f]{64})(\.json)?$", config_name)
    if digest and hashlib.sha256(data).hexdigest() != digest[1]:
        raise explain_digest(f"configuration {config_name} of {store.name}")
    config = parse_config(data, f"configuration in {store.name}")
    _check(config, len(names), architecture, store.name)
    layers = []
    for name, diff_id in zip(names, config.diff_ids, strict=True):
        archive = store.find(name)
        if archive is None:
            raise BuildError(f"{store.name} lacks the layer {name}", hint="save it again: docker save")
        layers.append(Layer(archive, f"layer {name} of {store.name}", "", diff_id))
    return ContainerImage(config, tuple(layers))


def _choose_by_tag(entries: list[Mapping[str, object]], reference: str, name: str) -> Mapping[str, object]:
    tags = [take_texts(entry.get("RepoTags"), f"manifest.json of {name}") for entry in entries]
    listed = [tag for some in tags for tag in some]
    if not reference:
        if len(entries) == 1:
            return entries[0]
        raise _explain_choice(f"{name} holds {len(entries)} images", listed)
    wanted = _complete(reference)
    for entry, some in zip(entries, tags, strict=True):
        if wanted in map(_complete, some):
            return entry
    raise _explain_choice(f"{name} holds no image '{reference}'", listed)


def _complete(reference: str) -> str:
    """A name as docker completes it: with a tag, and without its own registry."""
    short = reference.removeprefix("docker.io/").removeprefix("library/")
    return short if ":" in short.rpartition("/")[2] else f"{short}:latest"


# Both


def _read_document(store: ImageStore, name: str, place: Workplace) -> bytes:
    found = store.find(name)
    if found is None:
        raise BuildError(f"{store.name} lacks the document {name}", hint="make or download it again")
    return _read_limited(found, f"{name} of {store.name}", place)


def _read_limited(extent: Extent, name: str, place: Workplace) -> bytes:
    limit = place.budget.limits.document_bytes
    if extent.size_bytes > limit:
        raise BuildError(f"{name} has {extent.size_bytes} bytes, and a document of an image has {limit} at most")
    return b"".join(extent.chunks())


def _check(config: ImageConfig, layers: int, architecture: str, name: str) -> None:
    if len(config.diff_ids) != layers or not all(map(_DIFF_ID.fullmatch, config.diff_ids)):
        raise BuildError(f"{name} is damaged: it has {layers} layers, and digests of {len(config.diff_ids)}")
    known = _ARCHITECTURES.get(architecture, (architecture,))
    if config.system not in ("", "linux") or config.architecture not in ("", *known):
        raise ConfigError(
            f"{name} is for {config.system or 'linux'}/{config.architecture}, and the machine is linux/{architecture}",
            hint="choose an image for this architecture, or a machine for the image: --arch",
        )
