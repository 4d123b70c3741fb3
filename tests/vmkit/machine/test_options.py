"""The one table of machine options: the command line, vmkit.Machine and matrix files have its rows and no others."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from vmkit.cli.up import up
from vmkit.errors import ConfigError
from vmkit.machine.machine import Machine
from vmkit.machine.options import OPTIONS, make_spec
from vmkit.machine.spec import Accelerator, DiskMode, DiskSpec, MachineSpec
from vmkit.matrix.plan import KEYS

# What `up` does with a machine, and no part of it.
OF_UP = {"image", "folders", "wait_booted", "console", "reuse", "dry_run", "as_json", "quiet"}


def test_python_has_the_options_of_the_table_with_their_defaults() -> None:
    parameters = dict(inspect.signature(Machine.__init__).parameters)
    del parameters["self"], parameters["image"]
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        option.name: option.default for option in OPTIONS if option.is_python
    }


def test_command_line_has_the_options_of_the_table_in_their_order() -> None:
    names = [param.name for param in up.params if param.name not in OF_UP]
    assert names == [option.name for option in OPTIONS if option.flag]
    flags = {flag for param in up.params if isinstance(param, click.Option) for flag in param.opts}
    assert flags >= {option.flag for option in OPTIONS if option.flag}


def test_matrix_has_the_options_of_the_table() -> None:
    assert set(KEYS) & {option.name for option in OPTIONS} == {option.name for option in OPTIONS if option.is_matrix}
    # vmkit.Machine takes them.
    assert all(option.is_python for option in OPTIONS if option.is_matrix)


def test_every_field_of_a_machine_has_an_option() -> None:
    described = {option.field or option.name for option in OPTIONS if option.is_python}
    assert described | {"image", "source", "container", "stored", "more"} == {
        field.name for field in fields(MachineSpec)
    }


def test_defaults_of_the_table_are_those_of_a_machine() -> None:
    assert make_spec("tiny", {}) == MachineSpec()


def test_values_are_read_by_their_rows() -> None:
    given = {"memory": "1G", "accelerator": "tcg", "kernel": "/k", "disks": ["/a"], "rwdisks": ["/b"], "timeout_s": 5.0}
    disks = (DiskSpec(Path("/a")), DiskSpec(Path("/b"), DiskMode.READ_WRITE))
    assert make_spec("my", given) == MachineSpec(
        image="my", memory_mib=1024, accelerator=Accelerator.TCG, kernel=Path("/k"), disks=disks, timeout_s=5.0
    )
    assert make_spec("my", {"accelerator": "auto", "memory": 512}).memory_mib == 512
    with pytest.raises(ConfigError, match="accelerator must be one of auto, kvm, tcg, not 'x'"):
        make_spec("my", {"accelerator": "x"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cpus": "x"}, "cpus must be a whole number, not 'x'"),
        ({"cpus": True}, "cpus must be a whole number, not True"),
        ({"memory": None}, "memory must be text or a whole number, not None"),
        ({"timeout_s": "a"}, "timeout_s must be a number of seconds, not 'a'"),
        ({"append": 5}, "append must be text, not 5"),
        ({"kernel": b"x"}, "kernel must be a path, not b'x'"),
        ({"disks": "/a"}, "disks must be a list of paths, not '/a'"),
        ({"disks": [5]}, "disks must be a list of paths, and 5 is not a path"),
        ({"token": "x"}, "token must be True or False, not 'x'"),
        ({"accelerator": 5}, "accelerator must be text, not 5"),
        ({"memroy": 1}, "a machine has no option 'memroy'"),
    ],
)
def test_value_of_another_kind_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_spec("tiny", options)
    assert caught.value.brief == reason


def test_values_that_python_may_give_are_taken(tmp_path: Path) -> None:
    options = {"memory": "1G", "timeout_s": 3, "kernel": tmp_path / "k", "disks": [str(tmp_path)], "cid": None}
    spec = make_spec("tiny", options)
    assert (spec.memory_mib, spec.timeout_s, spec.kernel) == (1024, 3, tmp_path / "k")
