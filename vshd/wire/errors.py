"""Whose fault it was: the failures a protocol core can have."""


class TokenError(ValueError):
    """What was given is no token, or there is none where one must be. The text never quotes it."""


class LocalProtocolError(Exception):
    """Our own side asked for something the protocol or the connection's state does not allow; nothing was changed."""


class RemoteProtocolError(Exception):
    """The peer sent something docs/reference/protocol.md does not allow; the connection cannot go on."""
