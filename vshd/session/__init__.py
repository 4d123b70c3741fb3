"""vshd.session: one session in a process of its own."""
