"""What ChromeOS's host serves to its guests, for a guest that has ChromeOS's own daemons: logs, and VmReady.

A process of its own reads what the guest sends (`python -m vmkit.cros`), and tells the monitor in notes.
"""
