"""What a machine's sessions have where a request names nothing: the user, directory and variables of its container
image, as `docker exec` has them.

vmkit writes them into the machine's record (docs/reference/files.md, `container`). They travel in requests, so vshd
needs to know nothing of images.
"""

import os

from vsh.registry import Entry
from vshd.wire.messages import SetupConnectionRequest


def fill_request(request: SetupConnectionRequest, entry: Entry | None) -> None:
    """Adds the user, directory and variables of the machine to a command's request, which keeps its own."""
    container = None if entry is None else entry.container
    if not container:
        return
    request.user = request.user or find_user(entry)
    if not request.cwd and not request.cwd_pid:
        request.cwd = _take_text(container.get("working_dir"))
    words = container.get("env")
    request.env = parse_variables(words if isinstance(words, list) else []) | request.env
    request.keeps_env = True


def find_user(entry: Entry | None) -> bytes:
    """The user of the machine's sessions; empty where that is vshd's choice."""
    container = None if entry is None else entry.container
    return _take_text(container.get("user")) if container else b""


def parse_variables(words: "list[object]") -> dict[bytes, bytes]:
    """Variables of NAME=VALUE; the last one of a name counts. Other words are no variables."""
    variables = {}
    for word in words:
        name, equals, value = _take_text(word).partition(b"=")
        if name and equals:
            variables[name] = value
    return variables


def _take_text(value: object) -> bytes:
    return os.fsencode(value) if isinstance(value, str) else b""
