"""vmkit.matrix: runs a file of images, kernels, backends and commands in machines, and reports the results."""
