"""Container mode: vshd listens nowhere, and serves one session on a connection that it makes itself."""

from vshd.carry.vsock import HOST_CID
from vshd.firmware import check_provable, find_token
from vshd.flags import Options
from vshd.listener import connect_to
from vshd.log import Log
from vshd.root import open_root
from vshd.services.table import Surroundings
from vshd.session.session import Session
from vshd.signals import SIGCHLD, SIGTERM, Wakeup


def serve_one(options: Options, log: Log) -> int:
    """Connects to where the flags say, and serves one session there.

    Raises OSError, VsockError, FlagError, TokenError.
    """
    where = options.forward_to or f"vsock:{HOST_CID}:{options.forward_to_host_port}"
    # Before connecting: the client gives up a caller that takes long to prove itself.
    token = find_token(options.token_from, is_vsock=False)
    check_provable(token, options)
    root = open_root(options.root_namespace)
    fd = connect_to(where)
    around = Surroundings(options, is_frozen=False, facts=b"", renew=lambda: None, root=root)
    log.info("vshd started")
    Session(fd, where, options, log, Wakeup((SIGCHLD, SIGTERM)), token=token, around=around).run()
    return 0
