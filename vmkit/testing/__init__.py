"""vmkit.testing: the pytest plugin, which gives each test a fresh virtual machine."""
