"""maitred, ChromeOS's agent in a guest: the messages of its gRPC service, its server for guests, a client for hosts.

docs/howto/maitred.md shows its use. The folder is packed into the images whose recipes ask for the service.
"""
