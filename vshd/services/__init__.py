"""vshd.services: what a connection can become besides a session's command."""
