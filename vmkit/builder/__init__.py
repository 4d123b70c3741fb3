"""vmkit.builder: makes the snapshot of a machine that was booted twice, in a process of low priority."""
