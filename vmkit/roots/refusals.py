"""What skopeo says when a registry gives no image, in words that name the registry and the remedy.

Pure. skopeo's messages are those of its libraries (containers/image, Go's net and crypto/tls) and of the registry.
"""

import re
from dataclasses import dataclass

# The registry of names without one.
_HUB = "docker.io"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no image, and what to do."""

    brief: str
    hint: str


# The first that fits is the cause: a name that is not found is a refused connection to a name server, too.
_KNOWN = (
    (
        r"dial tcp: lookup|no such host|server misbehaving",
        "this host cannot find the address of the registry {host}",
        "check the name and the network; without one, take an archive: docker save IMAGE | vmkit up -",
    ),
    (
        r"connection refused",
        "no registry answers at {host}: the connection is refused",
        "start the registry, or check the name and the port",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        "the registry {host} speaks plain HTTP, which vmkit takes from registries of this host alone",
        'allow it in /etc/containers/registries.conf, in a table [[registry]]: location = "{host}", insecure = true',
    ),
    (
        r"x509: |failed to verify certificate|remote error: tls",
        "this host does not trust the certificate of the registry {host}",
        "put the certificate of its authority into /etc/containers/certs.d/{host}/ca.crt",
    ),
    (
        r"no image found in (manifest list|image index) for",
        "{reference} has no image for this architecture",
        "choose another image, or another machine: --arch",
    ),
    (
        r"toomanyrequests",
        "the registry {host} has had too many requests from this address",
        "wait, or log in: skopeo login {host}",
    ),
    (
        r"unauthorized|authentication required|authorization failed|access to the resource is denied|\bdenied\b",
        "the registry {host} does not give {reference} without a login",
        "check the name, or log in: skopeo login {host}",
    ),
    (
        r"manifest unknown|name unknown|not known to registry|\b404\b|repository .* not found",
        "the registry {host} has no image {reference}",
        "check the name and the tag: skopeo list-tags docker://{repository}",
    ),
    (
        r"i/o timeout|deadline exceeded|handshake timeout|network is unreachable|no route to host|did not end within",
        "the registry {host} cannot be reached",
        "check the network, and the variables for a proxy: HTTPS_PROXY, NO_PROXY",
    ),
    (r"no space left on device", "there is no space left for the image {reference}", "make room: vmkit prune"),
    (
        r"rejected by policy|policy\.json",
        "the policy of this host does not allow the image {reference}",
        "see policy.json in /etc/containers or ~/.config/containers",
    ),
)
# On the hub, what is not there and what is private have the same answer.
_ENGINE_HINT = "; for an image of your Docker engine: docker save {reference} | vmkit up -"


def find_registry(reference: str) -> str:
    """The registry of an image's name: its first word where that can be a host's, as docker has it."""
    first, slash, _ = reference.partition("/")
    return first if slash and (first == "localhost" or re.search(r"[.:]", first)) else _HUB


def explain_refusal(text: str, reference: str, brief: str) -> Refusal:
    """What a failure of skopeo means. text: its output. brief: what is told of one that is not known."""
    host = find_registry(reference)
    # A digest, or the tag behind the last slash.
    repository = re.sub(r":[^:/]*$", "", reference.partition("@")[0])
    words = {"host": host, "reference": reference, "repository": repository}
    for pattern, what, remedy in _KNOWN:
        if re.search(pattern, f"{brief}\n{text}", re.IGNORECASE):
            if host == _HUB and "check the name" in remedy and "network" not in remedy:
                return Refusal(what.format(**words), f"{remedy}{_ENGINE_HINT}".format(**words))
            return Refusal(what.format(**words), remedy.format(**words))
    return Refusal(
        f"skopeo cannot get the image: {brief}",
        "check the name and the network; for a registry that asks who you are: skopeo login",
    )
