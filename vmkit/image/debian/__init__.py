"""vmkit.image.debian: Debian's archives, packages and lock files."""
