"""Copies files and directories in and out of guests, by SFTP version 3 over vsock. It trusts no guest."""
