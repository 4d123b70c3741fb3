"""The Docker engine: finds it, checks that it answers, and explains its refusals with the next step.

This module imports the SDK only when it is used: it is an extra, and slow to import.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from vmkit.errors import BuildError, ConfigError, HostError, VmkitError

if TYPE_CHECKING:
    from docker import APIClient

DEFAULT_HOST = "unix:///var/run/docker.sock"
# For the short questions; streams of builds and containers have no deadline of the engine's.
TIMEOUT_S = 60
FULL_DISK = "no space left on device"
_UNREACHABLE = ("no such host", "network is unreachable", "i/o timeout", "connection refused", "dial tcp", "timeout")
_BASE_HINT = "check the name, or name a base the engine has: vmkit docker build --base IMAGE"


def find_host() -> str:
    """Returns $DOCKER_HOST, else the default socket."""
    return os.environ.get("DOCKER_HOST") or DEFAULT_HOST


def is_local(host: str) -> bool:
    """True when the engine runs on this host, so that it has the devices of this host."""
    return urlparse(host).scheme == "unix"


@contextlib.contextmanager
def open_engine() -> Iterator["APIClient"]:
    """Yields an engine that answers. Every failure of the SDK, also in the block, becomes a VmkitError."""
    try:
        import docker  # noqa: PLC0415  (see above)
    except ImportError as error:
        raise HostError(
            "the Docker SDK for Python is not installed", hint="install it: pip install 'vmkit-vsh[docker]'"
        ) from error
    host = find_host()
    with _explain(host):
        client = docker.APIClient(base_url=host, version="auto", timeout=TIMEOUT_S, **_find_tls(host))
        try:
            yield client
        finally:
            client.close()


def _find_tls(host: str) -> dict[str, object]:
    """Returns the SDK's reading of DOCKER_TLS_VERIFY and DOCKER_CERT_PATH, for an engine on another host."""
    if is_local(host):
        return {}
    from docker.utils import kwargs_from_env  # noqa: PLC0415  (see above)

    return {"tls": kwargs_from_env().get("tls", False)}


@contextlib.contextmanager
def _explain(host: str) -> Iterator[None]:
    import requests  # noqa: PLC0415  (the SDK's, see above)
    import urllib3  # noqa: PLC0415  (what requests lets through when a stream breaks)
    from docker.errors import APIError, DockerException  # noqa: PLC0415  (see above)

    try:
        yield
    except VmkitError:
        raise
    except APIError as error:
        raise explain_refusal(str(error.explanation or error)) from error
    except (DockerException, requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _explain_silence(error, host) from error


def explain_refusal(text: str) -> VmkitError:
    """Returns the error for a refusal of the engine, with the remedy."""
    lower = text.lower()
    if FULL_DISK in lower:
        return BuildError("the engine's disk is full", details=text, hint="make room: docker system prune")
    if "pull access denied" in lower or "manifest unknown" in lower or "repository does not exist" in lower:
        return ConfigError("the engine cannot find the base image", details=text, hint=_BASE_HINT)
    if "no such image" in lower:
        return ConfigError("the image is not built yet", details=text, hint="build it: vmkit docker build")
    if any(word in lower for word in _UNREACHABLE):
        hint = "without a network, name a base that the engine has: vmkit docker build --base IMAGE"
        return BuildError("the engine cannot reach the registry", details=text, hint=hint)
    return HostError("the Docker engine refused", details=text, hint="see the engine's own log: journalctl -u docker")


def _explain_silence(error: Exception, host: str) -> HostError:
    """Returns the error for an engine that does not answer: it does not run, or refuses this user."""
    cause = _find_os_error(error)
    if cause is not None and cause.errno in (errno.EACCES, errno.EPERM):
        return HostError(
            f"this user cannot open the socket of the Docker engine at {host}",
            hint="join the group docker: sudo usermod -aG docker $USER, then log in again",
        )
    if cause is not None and cause.errno in (errno.ENOENT, errno.ECONNREFUSED):
        return HostError(
            f"no Docker engine answers at {host}",
            hint="install and start one (sudo apt-get install docker.io), or name another: DOCKER_HOST=unix:///PATH",
        )
    return HostError(
        f"the Docker engine at {host} broke the connection", details=str(error), hint="see whether it runs: docker info"
    )


def _find_os_error(error: BaseException | None) -> OSError | None:
    """Finds the system's own error below the layers that wrapped it."""
    import requests  # noqa: PLC0415  (see above)

    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        link = waiting.pop()
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        # Every error of requests is an OSError, too, and has no number.
        if isinstance(link, OSError) and not isinstance(link, requests.RequestException) and link.errno:
            return link
        waiting += [link.__cause__, link.__context__, *link.args]
    return None
