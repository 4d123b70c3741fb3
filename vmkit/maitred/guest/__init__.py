"""maitred's server: what runs in the guest, on what Debian's python3-grpclib brings and vshd's own modules."""
