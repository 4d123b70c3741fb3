"""vsh.forward: connections between this host and a guest, carried over vsock: -L, -R, --proxy."""
