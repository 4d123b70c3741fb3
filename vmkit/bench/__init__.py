"""vmkit.bench: the race of vsh against ssh over the same vsock, and what becomes of its figures."""
