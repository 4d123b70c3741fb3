"""vmkit.pool: machines that are restored, warmed and paused before they are needed, each for one use."""
