"""What a user may ask for, and what is said when it cannot be."""

from typing import Any

import pytest

from vmkit.errors import ConfigError
from vmkit.machine.spec import LAST_GUEST_CID, MachineSpec, parse_memory


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 2**32 - 1, 2**32, 2**64])
def test_spec_refuses_reserved_cid(cid: int) -> None:
    with pytest.raises(ConfigError, match=f"--cid must be between 3 and 4294967294, not {cid}"):
        MachineSpec(cid=cid)


@pytest.mark.parametrize("cid", [3, LAST_GUEST_CID])
def test_spec_takes_every_guest_cid(cid: int) -> None:
    assert MachineSpec(cid=cid).cid == cid


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "x" * 33, "a b", "ä"])
def test_spec_refuses_name_that_is_no_file_name(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a machine's name"):
        MachineSpec(name=name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_mib", 63),
        ("cpus", 0),
        ("cpus", 256),
        ("timeout_s", 0.0),
        ("timeout_s", float("nan")),
        ("append", "a\nb"),
        ("gdb_port", 0),
        ("gdb_port", 65536),
        ("cpu", ""),
        ("cpu", "max host"),
        ("cpu", "-cpu"),
        ("disks", (None,) * 21),
    ],
)
def test_spec_refuses_what_cannot_boot(field: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        MachineSpec(**{field: value})


def test_spec_defaults_are_crosvms() -> None:
    spec = MachineSpec()
    assert (spec.image, spec.memory_mib, spec.cpus, spec.cid, spec.name) == ("tiny", 256, 1, None, None)


@pytest.mark.parametrize(("text", "mib"), [("256", 256), ("512M", 512), ("2G", 2048), ("1gib", 1024), ("64MB", 64)])
def test_memory_is_parsed(text: str, mib: int) -> None:
    assert parse_memory(text) == mib


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1T", "0x10", "1000000000000"])
def test_memory_that_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not an amount of memory"):
        parse_memory(text)
