"""vmkit.snapshots: memory of booted guests, kept in the cache: what a snapshot depends on, its files, its pages."""
