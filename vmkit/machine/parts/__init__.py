"""The parts of a machine: one file for each thing that a machine can have, and one table that lists them."""
