"""vmkit.cli: verbs, options, and the form of answers; no logic of machines or images."""
