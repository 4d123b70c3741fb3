"""Layers over each other: what a later one takes away, puts and replaces, and that no name leads out of the tree."""

import tarfile
from collections.abc import Sequence

import pytest

from tests.vmkit.roots.archives import Piece, folder, link, make_tar, member
from vmkit.errors import BuildError
from vmkit.image.formats.tree import FileKind, Tree
from vmkit.roots.layers import add_archive, add_layer
from vmkit.roots.limits import RootLimits
from vmkit.roots.workplace import Workplace


def lay(place: Workplace, *layers: Sequence[Piece]) -> Tree:
    tree = Tree(merged=False)
    for number, pieces in enumerate(layers):
        archive = place.keep([make_tar(pieces)])
        add_layer(tree, archive, f"layer {number}", place.budget)
    return tree


def show(tree: Tree) -> dict[str, bytes]:
    """Files with their content; directories and others have none."""
    return {path: b"".join(node.chunks()) for path, node in tree.walk()}


def test_whiteout_takes_away_what_is_below_and_nothing_of_its_own_layer(place: Workplace) -> None:
    tree = lay(
        place,
        [("etc/gone", b"1"), ("etc/kept", b"2"), ("old/a/b", b"3"), ("open/a", b"4"), ("open/b", b"5")],
        [
            ("etc/.wh.gone", b""),
            ("etc/.wh.never", b""),
            (".wh.old", b""),
            ("open/new", b"6"),
            ("open/.wh..wh..opq", b""),
            ("open/.wh..wh.plnk", b""),
        ],
    )
    assert show(tree) == {"etc": b"", "etc/kept": b"2", "open": b"", "open/new": b"6"}


def test_later_layer_replaces_a_kind_by_another(place: Workplace) -> None:
    tree = lay(
        place,
        [("a/b", b"1"), ("c", b"2"), link("l", "a"), folder("d", mode=0o700)],
        [folder("c"), folder("l"), folder("d", mode=0o755), ("a", b"3")],
    )
    assert show(tree) == {"a": b"3", "c": b"", "d": b"", "l": b""}
    found = tree.find("d")
    assert found is not None
    assert found.mode == 0o755


def test_file_that_was_a_parent_is_damage(place: Workplace) -> None:
    with pytest.raises(BuildError, match="layer 1 is damaged: cannot put '/c/d' there: '/c' is a file"):
        lay(place, [("c", b"2")], [("c/d", b"4")])


def test_links_lead_nowhere_but_into_the_tree(place: Workplace) -> None:
    tree = lay(
        place,
        [link("out", "../../../../tmp"), link("abs", "/etc")],
        [("out/file", b"1"), ("abs/passwd", b"2"), ("abs/.wh.group", b"")],
        [("out/.wh.file", b"")],
    )
    assert show(tree) == {"abs": b"/etc", "etc": b"", "etc/passwd": b"2", "out": b"../../../../tmp", "tmp": b""}


def test_hard_link_is_the_same_file_in_the_layer_and_over_layers(place: Workplace) -> None:
    tree = lay(
        place,
        [("a", b"1"), link("b", "a", tarfile.LNKTYPE)],
        [link("c", "./b", tarfile.LNKTYPE), ("a", b"2")],
    )
    assert show(tree) == {"a": b"2", "b": b"1", "c": b"1"}
    assert tree.find("b") is tree.find("c")


@pytest.mark.parametrize("target", ["missing", "d"])
def test_hard_link_to_no_file_is_refused(place: Workplace, target: str) -> None:
    with pytest.raises(BuildError, match=f"layer 0 is damaged: 'b' is a hard link to '{target}'"):
        lay(place, [folder("d"), link("b", target, tarfile.LNKTYPE)])


@pytest.mark.parametrize("name", [".wh.", ".wh...", ".wh.."])
def test_whiteout_of_no_name_is_refused(place: Workplace, name: str) -> None:
    with pytest.raises(BuildError, match=rf"layer 0 is damaged: the whiteout 'etc/{name}' names no file"):
        lay(place, [(f"etc/{name}", b"")])


def test_devices_and_set_user_bits_are_entries_and_nothing_more(place: Workplace) -> None:
    tree = lay(place, [member("mem", tarfile.CHRTYPE, devmajor=1, devminor=1, mode=0o666), member("su", mode=0o4755)])
    device, program = tree.find("mem"), tree.find("su")
    assert device is not None
    assert program is not None
    assert (device.kind, device.device, program.mode) == (FileKind.CHARACTER, (1, 1), 0o4755)


def test_plain_archive_has_no_whiteouts(place: Workplace) -> None:
    tree = Tree(merged=False)
    add_archive(tree, place.keep([make_tar([("a/.wh.b", b"1"), ("a/.wh..wh..opq", b"2")])]), "root.tar", place.budget)
    assert sorted(show(tree)) == ["a", "a/.wh..wh..opq", "a/.wh.b"]


def test_more_than_the_limits_is_an_error(place: Workplace) -> None:
    place.budget.limits = RootLimits(entries=3, size_bytes=100)
    with pytest.raises(BuildError, match="the root has more than 3 files"):
        lay(place, [("a", b"1"), ("b", b"1")], [("c", b"1"), ("d", b"1")])
    with pytest.raises(BuildError, match="the root has more than 3 files"):
        lay(place, [("e", b"1" * 200)])


def test_size_that_a_header_only_claims_counts(place: Workplace) -> None:
    place.budget.limits = RootLimits(size_bytes=1 << 20)
    fields = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40), "GNU.sparse.name": "a"}
    with pytest.raises(BuildError, match="the root is larger than 1 MiB when it is unpacked"):
        lay(place, [member("a", pax_headers=fields)])
