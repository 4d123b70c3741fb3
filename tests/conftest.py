"""What every test stands on: AF_VSOCK of the build machine leads to its own host, so it is denied before anything is imported."""

import os

os.environ["VSH_AF_VSOCK"] = "deny"
