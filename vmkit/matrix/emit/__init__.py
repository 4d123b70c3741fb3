"""A matrix for an engine that runs jobs: GitHub Actions, Slurm, Kubernetes. Pure: each module renders text."""
