"""vshd.syslog: the process of a guest that collects what its programs and its kernel log, for the host."""
