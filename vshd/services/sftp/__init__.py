"""SFTP version 3, served from a connection of vshd: packets, what they ask of the file system, and the loop."""
