"""What every test stands on: AF_VSOCK is denied before anything is imported.

On a machine that is itself a guest it leads to somebody else's host.
"""

import os

os.environ["VSH_AF_VSOCK"] = "deny"
