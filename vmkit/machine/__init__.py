"""vmkit.machine: one running VM: its plan, its monitor process, its place in the registry."""
