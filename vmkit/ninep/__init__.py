"""vmkit.ninep: 9P2000.L, the protocol of shared folders for kernels that have no FUSE and no virtiofs."""
