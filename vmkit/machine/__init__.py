"""vmkit.machine: what `up` and other verbs do with a machine: its plan, its start, its place in the registry."""
