"""Measurements: what the project does, in figures. Results by machine are in `results/`."""
