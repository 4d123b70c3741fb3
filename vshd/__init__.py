"""vshd: the guest daemon; standard library only."""
