"""vmkit.memory: reads the kernel's log out of a guest's memory, without the guest's help."""
