"""Tile sizes and launch parameters of the Triton kernels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Warps per program and depth of the software pipeline."""

    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class PassTiles:
    """How one pass is cut: queries x keys of a tile, and the launch of each kernel.

    The plan is cut in the same tiles as forward and backward, since they share its lists and bits.
    """

    block_m: int = 64
    block_n: int = 64
    forward: Launch = Launch()
    dq: Launch = Launch()
    dkv: Launch = Launch()

    def __post_init__(self):
        for size in (self.block_m, self.block_n):
            if size not in (16, 32, 64, 128):
                raise ValueError(f"a tile side must be 16, 32, 64 or 128, got {size}")


@dataclass(frozen=True)
class Tiles:
    """The tiles of a whole backend.

    split: most query blocks that one program of the key-gradient kernel reads; the keys that everybody
        reads (summaries, chords) have longer lists, which go to several programs.

    The defaults are not measured: 64 x 64, 4 warps and 3 stages are those of an earlier probe.
    """

    summarize: PassTiles = PassTiles(block_m=16)  # few queries: small blocks keep more of the GPU busy
    near: PassTiles = PassTiles()
    far: PassTiles = PassTiles()
    split: int = 64


def fitting(launch: Launch, resident: int, streamed: int, limit: int) -> Launch:
    """`launch` with as many of its stages as fit into shared memory, at least one.

    Args:
        resident: bytes held for the whole program.
        streamed: bytes loaded per iteration, held once per stage.
        limit: bytes of shared memory a program may use.
    """
    stages = max(1, min(launch.stages, (limit - resident) // streamed))
    return Launch(launch.warps, stages)
