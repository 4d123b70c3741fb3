"""Gets a container image from a registry by skopeo, or from a Docker engine where there is no skopeo.

skopeo needs no daemon and no root. Its first question is the image's configuration alone: where the cache has the root
already, no layer is fetched.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from vmkit.docker.engine import open_engine
from vmkit.errors import CommandError, ConfigError, HostError
from vmkit.roots.extents import Extent
from vmkit.roots.refusals import explain_refusal
from vmkit.roots.settings import ImageConfig, parse_config
from vmkit.roots.workplace import Workplace
from vmkit.run import run

# A registry's answer; a few gigabytes on a slow line.
_ASK_TIMEOUT_S = 60.0
_COPY_TIMEOUT_S = 3600.0
# As docker does, registries of this host may speak plain HTTP.
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?/")
_POLICIES = ("~/.config/containers/policy.json", "/etc/containers/policy.json")

Progress = Callable[[str, float | None], None]


def has_skopeo() -> bool:
    return shutil.which("skopeo") is not None


def read_registry_config(reference: str, architecture: str) -> ImageConfig:
    """The configuration of an image in a registry. Raises HostError where none answers or has it."""
    words = [*_plan_skopeo(architecture), "inspect", "--config", *_plan_tls(reference, "--tls-verify=false")]
    answer = _run_skopeo([*words, f"docker://{reference}"], reference, _ASK_TIMEOUT_S)
    return parse_config(answer, f"configuration of {reference}")


def copy_from_registry(reference: str, architecture: str, place: Workplace) -> Path:
    """Copies an image into an OCI layout of the workplace. Raises HostError."""
    folder = place.make_folder()
    words = [*_plan_skopeo(architecture), "copy", "--quiet", *_plan_tls(reference, "--src-tls-verify=false")]
    _run_skopeo([*words, f"docker://{reference}", f"oci:{folder}:root"], reference, _COPY_TIMEOUT_S)
    return folder


def _plan_skopeo(architecture: str) -> list[str]:
    words = ["skopeo", "--override-os", "linux", "--override-arch", architecture]
    if not any(os.path.exists(os.path.expanduser(path)) for path in _POLICIES):  # noqa: PTH110, PTH111
        # Debian's skopeo comes without one where recommended packages are left out, and then refuses everything.
        words.append("--insecure-policy")
    return words


def _plan_tls(reference: str, word: str) -> list[str]:
    return [word] if _LOOPBACK.match(reference) else []


def _run_skopeo(words: list[str], reference: str, timeout_s: float) -> bytes:
    try:
        return run(words, timeout_s=timeout_s, package="skopeo")
    except CommandError as error:
        refusal = explain_refusal(error.details, reference, error.brief)
        raise HostError(refusal.brief, details=error.details, hint=refusal.hint) from error


def save_from_engine(reference: str, architecture: str, place: Workplace, tell: Progress) -> Extent:
    """What `docker save` would write, from an engine that has the image or can pull it. Raises HostError."""
    # Without a tag the engine would list every tag, and pull them all.
    name = reference if re.search(r"[:@][^/]*$", reference) else f"{reference}:latest"
    try:
        with open_engine() as engine:
            if not engine.images(name=name):
                tell(f"the engine pulls {name}", None)
                engine.pull(name, platform=f"linux/{architecture}")
            tell(f"the engine saves {name}", None)
            return place.keep(place.budget.limit(engine.get_image(name)))
    except HostError as error:
        raise HostError(
            f"cannot fetch {reference}: there is no skopeo, and {error.brief}",
            details=error.details,
            hint="install it: sudo apt-get install skopeo",
        ) from error
    except (ConfigError, CommandError) as error:
        raise HostError(
            f"the Docker engine cannot give the image {name}: {error.brief}",
            details=error.details,
            hint="check the name and the network, or install skopeo",
        ) from error
