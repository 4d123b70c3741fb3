"""The builder's entry: `python -m vmkit.builder FD` makes the snapshot that is ordered on the socket FD."""

import logging
import sys

from vmkit.builder.priority import lower_priority
from vshd.carry.inherited import settle_signals


def main() -> int:
    """Makes one snapshot."""
    lower_priority()
    settle_signals()
    # Standard output is the builder's log.
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s")
    # At the low priority: it imports half of vmkit.
    from vmkit.builder.build import run  # noqa: PLC0415

    return run(int(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
