"""vsh: the client; a shell, commands and files in a guest over vsock."""
