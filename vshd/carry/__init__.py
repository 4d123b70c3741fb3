"""vshd.carry: what client and daemon share to carry bytes: relays, pipes, endpoints, sockets, vsock."""
