"""vshd.wire: the shared protocol as bytes in, events out; no sockets and no clock in here."""
