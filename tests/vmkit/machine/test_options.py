"""The one table of machine options: the command line, vmkit.Machine and matrix files have its rows and no others."""

import inspect
from dataclasses import fields
from pathlib import Path

import click
import pytest

from vmkit.cli.up import up
from vmkit.errors import ConfigError
from vmkit.machine.machine import Machine
from vmkit.machine.options import OPTIONS, make_spec
from vmkit.machine.spec import Accelerator, DiskMode, DiskSpec, MachineSpec
from vmkit.matrix.plan import KEYS

# What `up` does with a machine, and no part of it.
OF_UP = {"image", "console", "reuse", "dry_run", "as_json", "quiet"}


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
    assert described | {"image", "more"} == {field.name for field in fields(MachineSpec)}


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
