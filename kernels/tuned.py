"""Launches measured by `python -m benchmarks.tune --write`, which writes this file."""

from .launch import Entry, Launch, Launches

TABLE = (
    Entry(
        capability=(9, 0),
        head_dim=64,
        itemsize=2,
        launches=Launches(
            forward_near=Launch(rows=64, columns=64, warps=4, stages=2, registers=128),
            forward_far=Launch(rows=64, columns=64, warps=4, stages=2, registers=128),
            dq_near=Launch(rows=64, columns=64, warps=4, stages=2, registers=128),
            dq_far=Launch(rows=64, columns=64, warps=4, stages=2, registers=128),
            dkv_near=Launch(rows=64, columns=64, warps=4, stages=3, registers=None),
            dkv_far=Launch(rows=64, columns=64, warps=4, stages=3, registers=None),
        ),
        gpu="NVIDIA H200",
        date="2026-11-22",
    ),
)
