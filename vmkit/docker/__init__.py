"""vmkit.docker: the project in a container, over the Docker SDK."""
