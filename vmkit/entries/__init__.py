"""vmkit.entries: directories with a record and a lock, for the machines and forwards that live on this host."""
