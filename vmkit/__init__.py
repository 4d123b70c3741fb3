"""vmkit: build guest images, launch QEMU with a vsock device, tend the machines."""
