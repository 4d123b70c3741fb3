"""The docker room: the project in a container, over the Docker SDK."""
