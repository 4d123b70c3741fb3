"""What the cells of a matrix run on, before any machine starts: images are built, and roots are packed, once each."""

import hashlib
from collections.abc import Iterable

from vmkit.machine.choose import Tell, build_image_of
from vmkit.machine.options import make_spec
from vmkit.machine.source import take_source
from vmkit.matrix.lock import hash_file, name_image
from vmkit.matrix.plan import Cell


def prepare_images(cells: Iterable[Cell], tell: Tell) -> dict[str, str]:
    """Builds the images and packs the roots of these cells. Returns their digests by their names in a lock.

    One after another: cells of one image would all wait for its build. Raises VshError kinds.
    """
    firsts = {(cell.image, cell.architecture): cell for cell in cells}
    return {name_image(cell): _prepare(cell, tell) for cell in firsts.values()}


def _prepare(cell: Cell, tell: Tell) -> str:
    spec = take_source(make_spec(cell.image, {"arch": cell.architecture}), tell)
    built, root = build_image_of(spec, tell), spec.root
    if root is None:
        return built.digest
    # What vmkit has packed is in the cache by the digest of its content.
    content = root.parent.name if spec.source else hash_file(root, "the root")
    return hashlib.sha256(f"{built.digest} {content}".encode()).hexdigest()
