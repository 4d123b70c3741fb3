"""Where the documents and layers of a container image are: files of a folder, or members of an archive.

Names are those that an image's documents give. They lead nowhere else: not out of the folder, and over no link of it.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Protocol

from vmkit.errors import BuildError
from vmkit.roots.extents import Extent
from vmkit.roots.members import MemberKind, read_members
from vmkit.roots.workplace import Workplace

_NAME = re.compile(r"[A-Za-z0-9._+=@-][A-Za-z0-9._+=@/:-]{0,1023}")
# What is at the top of an image's archive: documents, blobs, and the folders or files of layers, named by digests. The
# empty name is the archive's own folder.
IMAGE_TOPS = re.compile(
    r"|blobs|oci-layout|(index|manifest|config)\.json|repositories|(sha256:)?[0-9a-f]{64}(\.json|\.tar|\.tar\.gz)?"
)
# An image's archive has a few members for each layer.
_MEMBER_LIMIT = 20_000
_LINK_LIMIT = 4


class ImageStore(Protocol):
    """Documents and layers by name."""

    name: str

    def find(self, name: str) -> Extent | None:
        """A file of the image, or None. Raises BuildError for a name that no image has."""
        ...


def take_name(name: str, store: str) -> str:
    """A name that stays inside of the image."""
    if not _NAME.fullmatch(name) or ".." in name.split("/"):
        raise BuildError(f"{store} is damaged: it names the file '{name[:80]}', which no image has")
    return name


class FolderStore:
    """An OCI layout in a folder."""

    def __init__(self, folder: Path, place: Workplace) -> None:
        self.name = str(folder)
        self._folder = folder
        self._place = place

    def find(self, name: str) -> Extent | None:
        path = self._folder / take_name(name, self.name)
        # A link could lead to any file of the user's.
        if any(
            parent.is_symlink() for parent in (path, *path.parents) if parent.is_relative_to(self._folder / "blobs")
        ):
            raise BuildError(
                f"{path} is a symbolic link, or in a folder that is one", hint="copy the layout: skopeo copy"
            )
        return self._place.open(path) if os.path.isfile(path) else None  # noqa: PTH113  (False for too long a name)


class ArchiveStore:
    """The members of a tar: `docker save`, skopeo's docker-archive and oci-archive."""

    def __init__(self, archive: Extent, name: str) -> None:
        """Reads the archive's headers. Raises BuildError for a damaged one."""
        self.name = name
        self._archive = archive
        self._files: dict[str, Extent] = {}
        self._links: dict[str, str] = {}
        for number, member in enumerate(read_members(archive.read, name=name)):
            if number >= _MEMBER_LIMIT:
                raise BuildError(f"{name} has more than {_MEMBER_LIMIT} members, and no container image has so many")
            if member.kind is MemberKind.FILE and member.runs is None:
                self._files[member.path] = Extent(archive.file, archive.offset + member.offset, member.size_bytes)
            elif member.kind is MemberKind.SYMLINK:
                # docker and skopeo name a layer that is there twice by a link.
                self._links[member.path] = posixpath.normpath(
                    posixpath.join(posixpath.dirname(member.path), member.link)
                )
            elif member.kind is MemberKind.HARD_LINK:
                self._links[member.path] = member.link

    def find(self, name: str) -> Extent | None:
        path = take_name(name, self.name)
        for _ in range(_LINK_LIMIT):
            if path in self._files:
                return self._files[path]
            path = self._links.get(path, "")
        return None
