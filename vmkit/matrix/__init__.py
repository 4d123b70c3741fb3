"""The matrix room: one file of images, kernels, backends and commands becomes machines, results and a report."""
