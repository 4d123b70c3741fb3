"""vmkit.vsock: the userspace virtio-vsock device, a process of its own; imports nothing from the rest of vmkit."""
