"""What every test stands on: AF_VSOCK is denied before anything is imported.

On a machine that is itself a guest it leads to somebody else's host.
"""

import os
import signal

os.environ["VSH_AF_VSOCK"] = "deny"
# A shell starts what runs in its background with these ignored, and every program below would inherit that: those that
# the tests interrupt would never hear of it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
