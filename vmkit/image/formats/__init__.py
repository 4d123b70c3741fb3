"""vmkit.image.formats: file formats as values: trees, cpio, ext4, ELF, kernels, LZ4."""
