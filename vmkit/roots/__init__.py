"""Reads any root file system: a folder, an archive, a container image or a disk becomes a disk for a guest."""
