"""A pool before its first machine: names, sizes, options, and a registry without a keeper."""

import os
from pathlib import Path
from typing import Any

import pytest

import vmkit
from vmkit.errors import ConfigError, HostError, MachineError, NameInUseError
from vmkit.pool.keeper import Order
from vmkit.pool.pool import NOT_POOLED, shrink, start_keeper, start_pool
from vmkit.pool.registry import keep, pick_pool, read_pools


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(path))
    return path


@pytest.mark.parametrize(("available_mib", "size"), [(0, 8), (100_000, 8), (4096, 8), (1200, 4), (600, 1), (100, 1)])
def test_pool_is_as_large_as_memory_allows(available_mib: int, size: int) -> None:
    lines: list[str] = []
    assert shrink(8, 256, lambda text, _: lines.append(text), available_mib) == size
    assert lines == (
        [] if size == 8 else [f"{available_mib} MiB of memory are available: the pool has {size} machines, not 8"]
    )


@pytest.mark.parametrize("option", sorted(set(NOT_POOLED) - {"name"}))
def test_option_of_one_machine_is_refused(option: str) -> None:
    options: dict[str, Any] = {option: 1}
    with pytest.raises(ConfigError, match=f"cannot have the option '{option}'"):
        vmkit.Pool("tiny", **options)


@pytest.mark.parametrize("size", [0, -1, 65])
def test_size_has_limits(size: int) -> None:
    with pytest.raises(ConfigError, match=f"--size must be between 1 and 64, not {size}"):
        start_pool(vmkit.MachineSpec(), size=size)


@pytest.mark.parametrize(("name", "reason"), [("a/b", "name"), ("x" * 30, "at most 25 characters, not 30")])
def test_name_has_limits(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        start_pool(vmkit.MachineSpec(), name=name)


def test_path_that_is_too_long_for_a_socket_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ("x" * (90 - len(str(tmp_path))) if len(str(tmp_path)) < 90 else "x")
    path.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(path))
    with pytest.raises(HostError, match="the path of the pool's socket has") as caught:
        start_keeper(Order(vmkit.MachineSpec(), "x" * 25, 1, os.getpid()))
    assert "shorter --name" in caught.value.hint
    assert not isinstance(caught.value, NameInUseError)
    assert list((path / "pools").iterdir()) == []


def test_pool_that_is_not_there_is_named() -> None:
    assert read_pools() == []
    with pytest.raises(MachineError, match="no pool is running"):
        pick_pool(None)
    with pytest.raises(MachineError, match="no pool named 'p' is running"):
        vmkit.find_pool("p")


def test_entry_is_seen_once_it_is_published_and_gone_with_its_keeper(runtime: Path) -> None:
    with keep("p", "tiny", 3) as entry:
        assert read_pools() == []
        entry.publish()
        assert [(pool.name, pool.image, pool.size) for pool in read_pools()] == [("p", "tiny", 3)]
        with keep("p", "tiny", 3) as second, pytest.raises(MachineError, match="a pool named 'p' is running"):
            second.publish()
        assert pick_pool(None).name == "p"
        with pytest.raises(MachineError, match="the pool 'p' has ended"):
            vmkit.find_pool("p").status()
    assert read_pools() == []
    assert list((runtime / "pools").iterdir()) == []
