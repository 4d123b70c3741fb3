"""Whose fault it was: the two failures a protocol core can have."""


class LocalProtocolError(Exception):
    """Our own side asked for something the protocol or the connection's state does not allow; nothing was changed."""


class RemoteProtocolError(Exception):
    """The peer sent something docs/PROTOCOL.md does not allow; the connection cannot go on."""
