"""A machine for one command: what it runs, and its run from the start of the machine to its end (`vmkit run`)."""
