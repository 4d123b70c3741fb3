"""vmkit.ssh: ssh to a machine over vsock, with keys that are made for it and nothing to confirm."""
