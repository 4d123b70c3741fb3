"""vshd.pid1: vshd as the first process of a small guest."""
