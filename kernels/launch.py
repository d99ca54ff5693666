"""How the update kernels are launched: as measured on this GPU, or by what fits its shared memory."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

from .tuned import ENTRIES


@dataclass(frozen=True)
class Launch:
    """One kernel's tile and compiler options.

    Attributes:
        block_m: tokens of its own block that a program takes.
        block_n: gathered tokens that it takes at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        maxnreg: limit of registers per thread (fewer let more programs run at once); None leaves it open.
    """

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None

    def __post_init__(self):
        if self.block_m not in (16, 32, 64):
            raise ValueError(f"block_m must be 16, 32 or 64, got {self.block_m}")
        if self.block_n not in (32, 64, 128):
            raise ValueError(f"block_n must be 32, 64 or 128, got {self.block_n}")


@dataclass(frozen=True)
class Launches:
    """One launch for each kernel of the update phase and each pass, local and same-instrument."""

    forward_local: Launch = Launch()
    forward_same_inst: Launch = Launch()
    dq_local: Launch = Launch()
    dq_same_inst: Launch = Launch()
    dkv_local: Launch = Launch()
    dkv_same_inst: Launch = Launch()

    @classmethod
    def all(cls, launch: Launch) -> "Launches":
        """The same launch for every kernel."""
        return cls(*[launch] * 6)


@dataclass(frozen=True)
class Gpu:
    """What launches are chosen by.

    Attributes:
        vendor: "nvidia" or "amd", who number capabilities alike (gfx90a of AMD calls itself 9.0, as Hopper).
        capability: major and minor.
        program_memory: bytes of shared memory that a program may use.
        sm_memory, sm_threads, sm_registers: of a multiprocessor, which its programs share.
    """

    vendor: str
    capability: tuple[int, int]
    program_memory: int
    sm_memory: int
    sm_threads: int
    sm_registers: int = 65_536

    @classmethod
    def of(cls, device: torch.device) -> "Gpu":
        found = torch.cuda.get_device_properties(device)
        return cls(
            "nvidia" if torch.version.hip is None else "amd",
            (found.major, found.minor),
            found.shared_memory_per_block_optin,
            found.shared_memory_per_multiprocessor,
            found.max_threads_per_multi_processor,
            found.regs_per_multiprocessor,
        )


@dataclass(frozen=True)
class Entry:
    """Launches measured on one family of GPUs, for one head_dim and size of the elements in bytes.

    `gpu` and `date` (YYYY-MM-DD) say on what and when.
    """

    vendor: str
    capability: tuple[int, int]
    head_dim: int
    itemsize: int
    launches: Launches
    gpu: str
    date: str


def read_entry(launches: dict[str, dict], **fields) -> Entry:
    """An entry of `tuned.py`."""
    return Entry(launches=Launches(**{name: Launch(**of) for name, of in launches.items()}), **fields)


TABLE = tuple(read_entry(**entry) for entry in ENTRIES)


def launches_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Launches:
    """The launches of `TABLE` for this GPU; without an entry, those that fit its shared memory."""
    return _override[-1] if _override else _chosen(device, dtype, head_dim)


@contextmanager
def override(launches: Launches):
    """Launch like this inside the context, whatever the table says: for tests and the tuner."""
    _override.append(launches)
    try:
        yield
    finally:
        _override.pop()


_override: list[Launches] = []


@cache
def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> Launches:
    return Launches() if device.type != "cuda" else launches_on(Gpu.of(device), head_dim, dtype.itemsize)


def launches_on(gpu: Gpu, head_dim: int, itemsize: int) -> Launches:
    """As `launches_for`, for elements of `itemsize` bytes."""
    for entry in TABLE:
        if (entry.vendor, entry.capability) == (gpu.vendor, gpu.capability):
            if (entry.head_dim, entry.itemsize) == (head_dim, itemsize):
                return entry.launches
    return untuned(head_dim, itemsize, gpu.program_memory)


def untuned(head_dim: int, itemsize: int, shared_memory: int) -> Launches:
    """Launches for a GPU that was never measured.

    Args:
        head_dim: channels per head.
        itemsize: bytes of an element.
        shared_memory: bytes a program may use.
    """
    forward = _fitting(head_dim, itemsize, shared_memory, resident=1)
    backward = _fitting(head_dim, itemsize, shared_memory, resident=2)
    return Launches(forward, forward, backward, backward, backward, backward)


def _fitting(head_dim: int, itemsize: int, limit: int, resident: int) -> Launch:
    """The largest tile whose operands fit: `resident` of block_m x D, and two of block_n x D per stage.

    In float32, whose products use no matrix units, the operands live in registers: more warps hold them.
    """
    launch = Launch(num_warps=16 if itemsize == 4 else 4)
    vector = head_dim * itemsize
    for block_m, stages in ((64, 3), (64, 2), (64, 1), (32, 2), (32, 1), (16, 1)):
        block_n = max(block_m, 32)
        if (resident * block_m + 2 * stages * block_n) * vector + _RESERVED <= limit:
            stages = 1 if itemsize == 4 else stages
            return replace(launch, block_m=block_m, block_n=block_n, num_stages=stages)
    return replace(launch, block_m=16, block_n=32, num_stages=1)


_RESERVED = 8 * 1024  # bytes for masks, statistics and conversions of layout
