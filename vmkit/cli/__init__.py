"""vmkit.cli: verbs and options, and how answers look; no logic of machines or images."""
