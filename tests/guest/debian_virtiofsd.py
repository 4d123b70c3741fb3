"""Debian's virtiofsd with the C library that it was built for: this host may be older than both."""

from pathlib import Path

from vmkit.image.build import fetch_packages
from vmkit.image.cache import Cache, find_cache_dir
from vmkit.image.debian.deb import read_deb
from vmkit.image.debian.packages import make_request, read_lock
from vmkit.image.formats.tree import FileKind, decode_name
from vmkit.image.recipe.config import load_image

LIBRARIES = ("libc6", "libcap-ng0", "libgcc-s1", "libseccomp2")
RECIPE = """
extends = "tiny"
suite = "trixie"
[extract]
virtiofsd = ["usr/libexec/virtiofsd"]
libcap-ng0 = ["usr/lib/*"]
libgcc-s1 = ["usr/lib/*"]
libseccomp2 = ["usr/lib/*"]
"""
SCRIPT = """#!/bin/sh
exec '{0}/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2' --library-path '{0}/usr/lib/x86_64-linux-gnu' \\
    '{0}/usr/libexec/virtiofsd' "$@"
"""


def lay_out_virtiofsd(folder: Path) -> Path:
    """A folder for PATH, with a program `virtiofsd`."""
    recipe = folder / "virtiofsd.toml"
    recipe.write_text(RECIPE)
    image = load_image(str(recipe))
    fetch_packages(image, lambda _text, _fraction: None)
    cache = Cache(find_cache_dir())
    lock = read_lock(cache, make_request(image))
    assert lock is not None
    for name in ("virtiofsd", *LIBRARIES):
        for path, node in read_deb(cache.package_path(lock.find(name).sha256)):
            if node.kind not in (FileKind.FILE, FileKind.SYMLINK) or not path.startswith(("usr/lib/", "usr/libexec/")):
                continue
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if node.kind is FileKind.SYMLINK:
                place.symlink_to(decode_name(node.data))
            else:
                place.write_bytes(node.data)
                place.chmod(0o755)
    programs = folder / "programs"
    programs.mkdir()
    (programs / "virtiofsd").write_text(SCRIPT.format(folder))
    (programs / "virtiofsd").chmod(0o755)
    return programs
