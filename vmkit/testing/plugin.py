"""The pytest plugin: fixtures `vm`, `vm_module`, `vm_session`, `vm_factory`, the marker `vm`, and evidence of failures.

pytest loads this in every run where vmkit is installed, so nothing else of vmkit is imported before a test wants a
machine.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from vmkit.pool.pool import PooledMachine
    from vmkit.testing.supply import Supply
    from vmkit.testing.wanted import Wanted
    from vsh.ending import Ending

Factory = Callable[..., "PooledMachine"]

MARKER = (
    "vm(image=, kernel=, memory=, backend=, files=, snapshot=, ...): the machine of the fixtures vm, vm_module and "
    "vm_factory; a list of images or kernels makes one test of each"
)
_SUPPLY = pytest.StashKey["Supply"]()
# Of the run: machines that were kept. Of a test: those that it has used.
_KEPT = pytest.StashKey[list[str]]()
_USED = pytest.StashKey[list["PooledMachine"]]()
_FAILED = pytest.StashKey[bool]()
# Of the run: whether any of its processes may have started a pool.
_HAS_POOLS = pytest.StashKey[bool]()
# Of the run: the process that its machines and pools belong to. A test may fork, and its child may go on in pytest.
_PROCESS = pytest.StashKey[int]()
# What the processes of pytest-xdist tell one another.
_RUN, _OUTPUT = "vmkit_run", "vmkit_kept"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options and the settings of the plugin."""
    group = parser.getgroup("vmkit", "virtual machines (vmkit)")
    group.addoption("--vm-keep-on-failure", action="store_true", help="leave the machines of failed tests running")
    group.addoption(
        "--vm-pool", type=int, metavar="COUNT", help="machines that wait for tests [default: one more than workers]"
    )
    parser.addini("vm_image", "the image of machines whose marker names none", default="tiny")
    parser.addini("vm_memory", "the memory of machines whose marker names none, such as 128M", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known."""
    config.addinivalue_line("markers", MARKER)
    config.stash[_KEPT] = []
    config.stash[_PROCESS] = os.getpid()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist: tells a worker which process the pools end with."""
    node.workerinput[_RUN] = os.getpid()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Of pytest-xdist: a worker has ended, and names the machines that it has kept. One that crashed names none."""
    kept = getattr(node, "workeroutput", {}).get(_OUTPUT)
    node.config.stash[_KEPT].extend(kept or [])
    if kept is not None or error is not None:
        node.config.stash[_HAS_POOLS] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sees this process's last machine gone, and ends the pools in the process that they belong to."""
    config = session.config
    if config.stash[_PROCESS] != os.getpid():
        # A child that a test has forked.
        return
    output = getattr(config, "workeroutput", None)
    is_used = _SUPPLY in config.stash
    if is_used:
        config.stash[_SUPPLY].finish()
    if output is not None:
        output[_OUTPUT] = config.stash[_KEPT] if is_used else None
    elif is_used or config.stash.get(_HAS_POOLS, False):
        _find_supply(config).end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how to reach the machines that were kept."""
    kept = terminalreporter.config.stash[_KEPT]
    if kept:
        terminalreporter.section("machines of failed tests")
        for line in kept:
            terminalreporter.line(line)
        terminalreporter.line("end them: vmkit down NAME")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A list of images or kernels makes one test of each."""
    marker = metafunc.definition.get_closest_marker("vm")
    if marker is None or "vm" not in metafunc.fixturenames:
        return
    from vmkit.testing.wanted import MarkerError  # noqa: PLC0415  (see the module's docstring)

    try:
        wanted = _read(metafunc.config, marker)
    except MarkerError:
        # The fixture reports it: it costs this test alone.
        return
    if len(wanted) > 1:
        metafunc.parametrize("vm", wanted, indirect=True, ids=str)


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> Iterator["PooledMachine"]:
    """A machine of this test alone, as its marker vm asks."""
    from vmkit.testing.wanted import Wanted  # noqa: PLC0415  (see the module's docstring)

    wanted = getattr(request, "param", None)
    if wanted is None:
        wanted = _find_wanted(request, request.node.get_closest_marker("vm"))[0]
    elif not isinstance(wanted, Wanted):
        _refuse(request, "give the fixture vm its machines by a list in the marker vm, and not by parametrize")
    yield from _lend(request, wanted)


@pytest.fixture(scope="module")
def vm_module(request: pytest.FixtureRequest) -> Iterator["PooledMachine"]:
    """A machine that the tests of a module share, as the module's marker vm asks."""
    yield from _lend(request, _find_one(request, request.node.get_closest_marker("vm")))


@pytest.fixture(scope="session")
def vm_session(request: pytest.FixtureRequest) -> Iterator["PooledMachine"]:
    """A machine that all tests of this process share."""
    yield from _lend(request, _find_wanted(request, None)[0])


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest) -> Iterator[Factory]:
    """Makes machines of this test alone: vm_factory(memory="1G"); words that are left out are the marker's."""
    marker = request.node.get_closest_marker("vm")
    with contextlib.ExitStack() as stack:

        def make(**words: Any) -> "PooledMachine":
            base = dict(marker.kwargs) if marker is not None else {}
            wanted = _find_one(request, pytest.mark.vm(**{**base, **words}).mark)
            return stack.enter_context(contextlib.contextmanager(_lend)(request, wanted))

        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test whose machine has ended by a fault fails, also when it did not notice."""
    result = yield
    for machine in _find_used(item):
        ending = _find_ending(machine)
        if ending is not None and not ending.is_expected:
            pytest.fail(f"the machine '{machine.name}' has ended: {ending.brief}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of each machine's logs to a failure, where the terminal and JUnit files show them."""
    if call.excinfo is not None and not item.config.getoption("fulltrace", False):
        _shorten(call.excinfo)
    report = yield
    if report.failed:
        for node in item.listchain():
            node.stash[_FAILED] = True
        machines = _find_used(item)
        if machines and item.config.getoption("showcapture", "all") != "no":
            from vmkit.testing.supply import read_evidence  # noqa: PLC0415  (see the module's docstring)

            for machine in machines:
                for title, text in read_evidence(machine).items():
                    _attach(report, title, text)
    return report


def _shorten(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Ends the traceback of an error of vmkit's at the line of the test: what is below tells its author nothing."""
    # A test that raises such an error has loaded the module; a run without machines does not load it.
    errors = sys.modules.get("vsh.errors")
    if errors is None or not isinstance(excinfo.value, errors.VshError):
        return
    # contextlib: the with blocks between two of vmkit's lines.
    ours = ("vmkit", "vsh", "vshd", "contextlib")
    last = None
    line: TracebackType | None = excinfo.tb
    while line is not None:
        if str(line.tb_frame.f_globals.get("__name__")).partition(".")[0] not in ours:
            last = line
        line = line.tb_next
    if last is not None:
        # pytest reads the traceback itself again, and ignores one that was set in its excinfo.
        last.tb_next = None


def _attach(report: pytest.TestReport, title: str, text: str) -> None:
    """JUnit files have the failure's own text, and not the sections beside it."""
    add = getattr(report.longrepr, "addsection", None)
    if add is not None:
        add(title, text)
    elif isinstance(report.longrepr, str):
        report.longrepr = f"{report.longrepr}\n--- {title} ---\n{text}"
    else:
        report.sections.append((title, text))


def _lend(request: pytest.FixtureRequest, wanted: "Wanted") -> Iterator["PooledMachine"]:
    from vsh.errors import VshError  # noqa: PLC0415  (see the module's docstring)

    try:
        machine = _find_supply(request.config).take(wanted)
    except VshError as error:
        # The author of the test needs the error, and not the lines of this plugin or what led to the error here.
        raise pytest.fail.Exception(f"{request.fixturename}: {error.render('vmkit')}", pytrace=False) from None
    node = request.node
    node.stash.setdefault(_USED, []).append(machine)
    try:
        yield machine
    finally:
        if request.config.stash[_PROCESS] != os.getpid():
            pass
        elif node.stash.get(_FAILED, False) and request.config.option.vm_keep_on_failure and not _find_ending(machine):
            machine.disown()
            request.config.stash[_KEPT].append(f"{machine.name}: vsh --cid {machine.cid}")
        else:
            _find_supply(request.config).end_machine(machine)


def _find_ending(machine: "PooledMachine") -> "Ending | None":
    """How the machine has ended; None while it runs, and where a test has shut the runtime directory."""
    from vsh.errors import VshError  # noqa: PLC0415  (see the module's docstring)

    try:
        return machine.find_ending()
    except VshError:
        return None


def _find_used(item: pytest.Item) -> "list[PooledMachine]":
    """The machines of the test, of its module and of the run."""
    return [machine for node in item.listchain() for machine in node.stash.get(_USED, [])]


def _read(config: pytest.Config, marker: pytest.Mark | None) -> "list[Wanted]":
    from vmkit.testing.wanted import read_marker  # noqa: PLC0415  (see the module's docstring)

    settings = {"image": config.getini("vm_image"), "memory": config.getini("vm_memory")}
    defaults = {name: value for name, value in settings.items() if value}
    return read_marker(marker.args if marker else (), marker.kwargs if marker else {}, defaults)


def _find_wanted(request: pytest.FixtureRequest, marker: pytest.Mark | None) -> "list[Wanted]":
    """The machines of a marker; a marker that cannot be fails the test."""
    from vmkit.testing.wanted import MarkerError  # noqa: PLC0415  (see the module's docstring)

    try:
        return _read(request.config, marker)
    except MarkerError as error:
        _refuse(request, str(error))


def _find_one(request: pytest.FixtureRequest, marker: pytest.Mark | None) -> "Wanted":
    wanted = _find_wanted(request, marker)
    if len(wanted) > 1:
        _refuse(
            request,
            f"{request.fixturename} takes one image and one kernel; lists in the marker vm are for the fixture vm",
        )
    return wanted[0]


def _refuse(request: pytest.FixtureRequest, reason: str) -> NoReturn:
    """Fails the test for what its author wrote, without the lines of this plugin."""
    raise pytest.fail.Exception(f"{request.node.nodeid}: {reason}", pytrace=False) from None


def _find_supply(config: pytest.Config) -> "Supply":
    supply = config.stash.get(_SUPPLY, None)
    if supply is None:
        from vmkit.testing.supply import Supply, count_cores  # noqa: PLC0415  (see the module's docstring)

        worker = getattr(config, "workerinput", {})
        run = int(worker.get(_RUN, os.getpid()))
        size = config.option.vm_pool or min(int(worker.get("workercount", 1)), count_cores()) + 1
        supply = config.stash[_SUPPLY] = Supply(run, size)
    return supply
