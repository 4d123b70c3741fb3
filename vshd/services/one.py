"""Container mode: vshd listens nowhere, and serves one session on a connection that it makes itself."""

from vshd.carry.vsock import HOST_CID
from vshd.firmware import check_provable, find_token
from vshd.flags import Options
from vshd.listener import connect_to
from vshd.log import Log
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
    fd = connect_to(where)
    log.info("vshd started")
    Session(fd, where, options, log, Wakeup((SIGCHLD, SIGTERM)), token=token).run()
    return 0
