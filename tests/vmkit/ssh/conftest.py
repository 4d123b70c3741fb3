"""Folders and verbs of one test of ssh."""

from tests.vmkit.cli.conftest import vmkit
from tests.vmkit.machine.conftest import folders

__all__ = ["folders", "vmkit"]
