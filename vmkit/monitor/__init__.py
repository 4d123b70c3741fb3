"""vmkit.monitor: the process that owns one machine, from QEMU's start to the last log line."""
