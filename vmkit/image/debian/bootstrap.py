"""A Debian installed from verified packages by mmdebstrap: users, alternatives and dpkg's database as in any other.

mmdebstrap is given an archive of precisely these packages, in a folder: it neither chooses nor fetches anything. It
runs as root or in a user namespace, whichever it can (fakechroot fails where the guest's C library is newer); what it
leaves is a tar, read into a Tree. Times are those of the packages, which makes two runs the same and keeps Python's
compiled modules valid.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vmkit.errors import BuildError, CommandError, HostError
from vmkit.image.debian.deb import DOCUMENTATION
from vmkit.image.debian.packages import Lock
from vmkit.image.formats.tar import read_tar
from vmkit.image.formats.tree import Tree
from vmkit.run import run

# 100 packages take half a minute, QEMU with all its libraries a minute; a slow disk three times that.
_TIMEOUT_S = 900.0
_CONTROL_TIMEOUT_S = 20.0
# ar(5): 8 bytes of magic, then per member a name of 16 bytes and a decimal time of 12.
_AR_TIME = slice(8 + 16, 8 + 16 + 12)
# Of mmdebstrap and of the packages' scripts: root's PATH, for every user who builds.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A person's account beside root's, as in tiny.
USER = "user"
_USER_ID = 1000

# mmdebstrap copies these from the host for the time of the installation; /dev is the kernel's.
_LEFT_OUT = ("dev/", "etc/resolv.conf", "etc/hostname", "etc/apt/sources.list", "run/", "tmp/", "proc/", "sys/")

# Where apt drops its privileges these are its own user's, elsewhere root's; apt puts that right when it runs.
_APT_OWNED = ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial")


def bootstrap(tree: Tree, lock: Lock, debs: dict[str, Path], work: Path) -> None:
    """Installs the lock's closure into the tree. work is an empty folder.

    Raises HostError without mmdebstrap, or where it may not do its work; BuildError when the installation fails.
    """
    if shutil.which("mmdebstrap", path=PATH) is None:
        raise HostError(
            "cannot find the program 'mmdebstrap', which installs Debian into an image",
            hint="install it: sudo apt-get install mmdebstrap",
        )
    with _open_workplace(work) as place:
        _write_archive(place, lock, debs)
        tar = place / "root.tar"
        _run_mmdebstrap(lock, place, tar, _find_epoch(debs[name] for name in lock.closure))
        read_root(tar, tree)


@contextmanager
def _open_workplace(work: Path) -> Iterator[Path]:
    """A folder for mmdebstrap, which without root works as other users of a namespace: the cache keeps those out."""
    if os.geteuid() == 0:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="vmkit-bootstrap-") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def read_root(tar: Path, tree: Tree) -> None:
    """Adds what an installation's tar holds, without device nodes and what is the host's."""
    with tar.open("rb") as file:
        try:
            for path, node in read_tar(file, keep_time=True):
                if not path.startswith(_LEFT_OUT):
                    tree.add(path, replace(node, uid=0) if path in _APT_OWNED else node)
        except BuildError as error:
            raise BuildError(f"cannot read what mmdebstrap has written: {error.brief}", hint=error.hint) from error


def _write_archive(folder: Path, lock: Lock, debs: dict[str, Path]) -> None:
    """A flat archive (sources.list(5)); the packages were verified on their way into the cache."""
    stanzas = []
    for name in lock.closure:
        record = lock.find(name)
        file = folder / f"{name}.deb"
        shutil.copyfile(debs[name], file)
        control = run(["dpkg-deb", "-f", debs[name]], timeout_s=_CONTROL_TIMEOUT_S, package="dpkg").decode().strip()
        place = f"Filename: ./{file.name}\nSize: {record.size_bytes}\nSHA256: {record.sha256}\n"
        stanzas.append(f"{control}\n{place}")
    (folder / "Packages").write_text("\n".join(stanzas))


def _find_epoch(debs: Iterable[Path]) -> int:
    """When the youngest package was made: no file of any of them is younger."""
    times = []
    for deb in debs:
        with deb.open("rb") as file:
            times.append(int(file.read(_AR_TIME.stop)[_AR_TIME]))
    return max(times)


def _run_mmdebstrap(lock: Lock, archive: Path, tar: Path, epoch_s: int) -> None:
    add_user = f'chroot "$1" useradd --uid {_USER_ID} --create-home --shell /bin/bash {USER}'
    words = [
        "mmdebstrap", "--quiet", "--mode=auto", "--variant=custom", "--architectures=amd64", "--format=tar",
        f"--include={','.join(lock.closure)}", f"--customize-hook={add_user}",
        *(f"--dpkgopt=path-exclude=/{pattern}" for pattern in DOCUMENTATION),
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        lock.suite, str(tar), f"deb [trusted=yes] copy:{archive} ./",
    ]  # fmt: skip
    environ = {
        "PATH": PATH,
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(tar.parent),
        "SOURCE_DATE_EPOCH": str(epoch_s),
        # The order in which a set is written into a .pyc must not change.
        "PYTHONHASHSEED": "0",
    }
    try:
        run(["setpriv", "--pdeathsig", "KILL", *words], timeout_s=_TIMEOUT_S, env=environ, package="util-linux")
    except CommandError as error:
        raise _explain(error) from error


def _explain(error: CommandError) -> BuildError | HostError:
    if "unable to pick chroot mode" in error.details or "unshare" in error.details or "newuidmap" in error.details:
        return HostError(
            "mmdebstrap cannot install packages here: it needs root, or user namespaces",
            details=error.details,
            hint="sudo apt-get install uidmap, and a line for you in /etc/subuid and /etc/subgid",
        )
    return BuildError("mmdebstrap cannot install the packages", details=error.details)
