"""vmkit.crashes: what is kept of the crashes of guests, below the user's data folder."""
