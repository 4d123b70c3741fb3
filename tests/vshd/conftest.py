"""The daemon's tests start it as the client's do."""

from tests.vsh.conftest import mode, start_vshd, vshd

__all__ = ["mode", "start_vshd", "vshd"]
