"""Options that a kernel lacks for a machine are named as lines for its .config."""

import pytest

from tests.vmkit.trees.trees import MakeTree
from vmkit.errors import ConfigError
from vmkit.trees.config import find_missing, find_needs, parse_config
from vmkit.trees.files import find_tree
from vmkit.trees.initrd import check_kernel_config


def test_config_is_read_as_kconfig_writes_it() -> None:
    config = parse_config(
        "# Linux/x86 6.12 Kernel Configuration\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\nCONFIG_D=n\n"
    )
    assert config.architecture == "x86"
    assert [config.has(name) for name in "ABCDE"] == [True, False, True, False, False]


def test_kernel_that_serves_is_not_complained_about(make_tree: MakeTree) -> None:
    files = find_tree(make_tree())
    check_kernel_config(files, find_needs())
    check_kernel_config(files, find_needs(root="ext4", has_disks=True))


@pytest.mark.parametrize(
    ("without", "root", "lines"),
    [
        (("VIRTIO_VSOCKETS",), "", ["CONFIG_VIRTIO_VSOCKETS=y"]),
        (("VIRTIO_MENU", "VIRTIO_PCI"), "", ["CONFIG_VIRTIO_MENU=y", "CONFIG_VIRTIO_PCI=y"]),
        (("OVERLAY_FS", "EXT4_FS"), "ext4", ["CONFIG_OVERLAY_FS=y", "CONFIG_EXT4_FS=y"]),
        # Parents that are there are not named.
        ((), "squashfs", ["CONFIG_MISC_FILESYSTEMS=y", "CONFIG_SQUASHFS=y"]),
        (("DEVTMPFS",), "", ["CONFIG_DEVTMPFS=y"]),
    ],
)
def test_missing_options_are_named_with_their_lines(
    make_tree: MakeTree, without: tuple[str, ...], root: str, lines: list[str]
) -> None:
    files = find_tree(make_tree(without=without))
    with pytest.raises(ConfigError) as caught:
        check_kernel_config(files, find_needs(root=root))
    assert caught.value.details.splitlines() == lines
    assert all(line.removesuffix("=y") in caught.value.brief for line in lines)
    assert "make olddefconfig" in caught.value.hint


def test_only_the_backend_with_a_token_needs_dmi() -> None:
    config = parse_config("")
    assert "CONFIG_DMI=y" in find_missing(find_needs(has_token=True), config)
    assert "CONFIG_DMI=y" not in find_missing(find_needs(), config)
    # An option that nothing could load in time must be built in.
    assert "CONFIG_BINFMT_SCRIPT=y" in find_missing(find_needs(), parse_config("CONFIG_BINFMT_SCRIPT=m\n"))
