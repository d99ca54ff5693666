"""Launches measured by `python -m benchmarks.tune --write`, which writes this file."""

from .launch import Entry

TABLE: tuple[Entry, ...] = ()
