"""vmkit.stored: machines that stay. Each has a folder of its own with its disk, what the disk is based on, a record."""
