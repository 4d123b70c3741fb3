"""Containers in guests: made of any root, started and stopped by crun."""
