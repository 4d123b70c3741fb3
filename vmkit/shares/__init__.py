"""vmkit.shares: folders of this host in a guest, granted and revoked while the machine runs."""
