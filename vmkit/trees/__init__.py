"""Kernels that their users built: what a build tree or a folder of modules has, and what a machine needs of it."""
