"""How a run's files are dealt to the workers of pytest-xdist: whole, and no more machines at a time than fit.

Owns the order alone. Files without machines come first, to every worker: their tests wait more than they compute. Files
with machines compute all the time, and need memory: two workers take those, and the other workers end before.
"""

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

# A worker has up to five machines at a time: 2 GiB.
VM_WORKERS = 2
VM_FILES = ("tests/guest/", "tests/vmkit/image/test_tiny_guest.py")
# One worker takes all of these, so that the host VM boots once in a run. It boots for a minute, and has 3 GiB.
NESTED_FILES = (
    "tests/guest/test_hostile_text.py", "tests/guest/test_nested.py", "tests/guest/test_vsock_sessions.py",
    "tests/guest/wall/test_vhost.py",
)  # fmt: skip
NESTED = "tests/guest/ with the host VM"


class Dealer(LoadFileScheduling):  # type: ignore[misc]  # xdist brings no types
    """Deals a file to one worker, as --dist loadfile does."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return NESTED if file in NESTED_FILES else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        plain = next((scope for scope in self.workqueue if not scope.startswith(VM_FILES)), None)
        if plain is not None:
            self.workqueue.move_to_end(plain, last=False)
        elif node not in self.nodes[:VM_WORKERS]:
            # It runs what it has, and ends.
            node.shutdown()
            return
        super()._assign_work_unit(node)
