"""How files are dealt to workers: each whole and once, machines to two workers, the host VM to one."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.dealer import NESTED_FILES, VM_FILES, VM_WORKERS, Dealer

TESTS = Path(__file__).parent
PLAIN = [f"tests/vsh/test_{letter}.py::test_{number}" for letter in "abcdef" for number in range(4)]
MACHINES = [f"tests/guest/test_{letter}.py::test_{number}" for letter in "abcd" for number in range(3)]
SINGLE = ["tests/vmkit/image/test_tiny_guest.py::test_it", "tests/guest/test_one.py::test_it[a::b]"]
NESTED = [f"{file}::test_{number}" for file in NESTED_FILES for number in range(2)]
ALL = [*PLAIN, *MACHINES, *SINGLE, *NESTED]


class Worker:
    """Runs a test when it knows the next one, or that there is none: as a worker of pytest-xdist."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.name = name
        self.waiting: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.waiting.extend(indices)

    def shutdown(self) -> None:
        self.shutting_down = True

    @property
    def is_able(self) -> bool:
        return len(self.waiting) > 1 or (self.shutting_down and bool(self.waiting))


def deal(tests: list[str], count: int) -> list[tuple[str, str]]:
    """Which worker ran which test, in the order of their ends."""
    config: Any = SimpleNamespace(
        getvalue=lambda _name: ["popen"] * count, option=SimpleNamespace(loadscopereorder=True)
    )
    dealer = Dealer(config)
    workers: list[Any] = [Worker(f"gw{number}") for number in range(count)]
    for worker in workers:
        dealer.add_node(worker)
        dealer.add_node_collection(worker, tests)
    dealer.schedule()
    ended = []
    while dealer.has_pending:
        able = [worker for worker in workers if worker.is_able]
        assert able, "no worker can go on"
        for worker in able:
            index = worker.waiting.pop(0)
            ended.append((worker.name, tests[index]))
            dealer.mark_test_complete(worker, index)
    assert all(worker.shutting_down for worker in workers)
    return ended


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("tests", [ALL, PLAIN, MACHINES, NESTED, SINGLE, ALL[-1:]])
def test_each_test_is_dealt_once_and_files_stay_whole(tests: list[str], count: int) -> None:
    ended = deal(tests, count)
    assert sorted(test for _, test in ended) == sorted(tests)
    workers_of: dict[str, set[str]] = {}
    for name, test in ended:
        workers_of.setdefault(test.partition("::")[0], set()).add(name)
    assert {len(names) for names in workers_of.values()} == {1}
    with_machines = {name for name, test in ended if test.startswith(VM_FILES)}
    assert len(with_machines) <= VM_WORKERS
    assert len({name for name, test in ended if test in NESTED}) <= 1


def test_files_without_machines_come_first_and_to_all_workers() -> None:
    ended = deal(ALL, 4)
    assert len({name for name, test in ended if test in PLAIN}) == 4
    for worker in {name for name, _ in ended}:
        kinds = [test.startswith(VM_FILES) for name, test in ended if name == worker]
        assert kinds == sorted(kinds)


def test_files_with_machines_are_known() -> None:
    marked = {
        str(path.relative_to(TESTS.parent))
        for path in TESTS.rglob("test_*.py")
        if re.search(r"^pytestmark = pytest\.mark\.vm$", path.read_text(), re.MULTILINE)
    }
    assert marked
    assert [name for name in marked if not name.startswith(VM_FILES)] == []


def test_files_with_the_host_vm_are_known() -> None:
    found = {
        str(path.relative_to(TESTS.parent))
        for path in (TESTS / "guest").rglob("test_*.py")
        if "nested_host" in path.read_text()
    }
    assert found == set(NESTED_FILES)
