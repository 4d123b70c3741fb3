"""vmkit.forward: forwards that last, and the mapping of vsock to IPv6."""
