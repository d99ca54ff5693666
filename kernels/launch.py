"""How the update kernels are launched: as measured on this GPU, or by how many programs fit it at once."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version

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
        if self.block_n not in (32, 64):
            raise ValueError(f"block_n must be 32 or 64, got {self.block_n}")


@dataclass(frozen=True)
class Specialized:
    """How a kernel is launched whose warp groups have different jobs: see `hopper_forward`.

    Attributes:
        maxnreg: registers per thread of a program, on average.
        producer_registers: of the warp group that copies; the first of those that multiply gets what is left.
        consumer_registers: of the second of those that multiply, if there is one.
        num_stages: gathered tiles that the ring holds.
        lag: tiles whose copies are under way when one is announced; at most two fewer than the ring holds.
    """

    maxnreg: int
    producer_registers: int
    consumer_registers: int | None = None
    num_stages: int = 4
    lag: int = 2

    def __post_init__(self):
        # Whoever multiplies may hold a tile and wait for the next, which is announced that much later.
        if not 0 < self.lag <= self.num_stages - 2:
            raise ValueError(f"lag must be 1 to {self.num_stages - 2}, got {self.lag}")


@dataclass(frozen=True)
class Launches:
    """One launch for each kernel of the update phase and each pass, local and same-instrument."""

    forward_local: Launch = Launch()
    forward_same_inst: Launch | Specialized = Launch()
    dq_local: Launch | Specialized = Launch()
    dq_same_inst: Launch | Specialized = Launch()
    dkv_local: Launch | Specialized = Launch()
    dkv_same_inst: Launch | Specialized = Launch()

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


# Three programs for dq on a multiprocessor, two for the others. Fewer registers make what multiplies spill.
SPECIALIZED = {
    "forward_same_inst": Specialized(maxnreg=80, producer_registers=24, consumer_registers=104, lag=1),
    "dq_local": Specialized(maxnreg=80, producer_registers=24, num_stages=3, lag=1),
    "dq_same_inst": Specialized(maxnreg=80, producer_registers=24, num_stages=3, lag=1),
    "dkv_local": Specialized(maxnreg=128, producer_registers=40, num_stages=3, lag=1),
    "dkv_same_inst": Specialized(maxnreg=128, producer_registers=40, num_stages=4, lag=1),
}
# Those that took at most 0.95 of the time of their twins on songs, on an H200 (see docs/attention.md).
FASTER = ("forward_same_inst", "dq_local", "dkv_local", "dkv_same_inst")
# Where all programs run at once, so many for each multiprocessor, their twins are done sooner: they have less
# to prepare.
_FEW_PROGRAMS = 3

TABLE = tuple(read_entry(**entry) for entry in ENTRIES)


def launches_for(device: torch.device, dtype: torch.dtype, head_dim: int, programs: int) -> Launches:
    """The launches of `TABLE` for this GPU; without an entry, those that suit its size.

    Args:
        device, dtype, head_dim: of queries.
        programs: of a kernel, about as many.
    """
    if _override:
        return _override[-1]
    return _chosen(device, dtype, head_dim, are_few(programs, device))


def are_few(programs: int, device: torch.device) -> bool:
    """Whether all programs of a kernel run at once, or nearly so."""
    return programs <= _FEW_PROGRAMS * multiprocessors(device)


@contextmanager
def override(launches: Launches):
    """Launch like this inside the context, whatever the table says: for tests and the tuner."""
    _override.append(launches)
    try:
        yield
    finally:
        _override.pop()


_override: list[Launches] = []


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU, where programs are interpreted one after the other, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int, few: bool) -> Launches:
    if device.type != "cuda":
        return Launches()
    gpu = Gpu.of(device)
    found = launches_on(gpu, head_dim, dtype.itemsize)
    chosen = FASTER if not few and can_specialize(gpu, head_dim, dtype.itemsize) else ()
    return replace(found, **{name: SPECIALIZED[name] for name in chosen})


def launches_on(gpu: Gpu, head_dim: int, itemsize: int) -> Launches:
    """As `launches_for`, for elements of `itemsize` bytes, where the warps of all kernels do the same."""
    for entry in TABLE:
        if (entry.vendor, entry.capability) == (gpu.vendor, gpu.capability):
            if (entry.head_dim, entry.itemsize) == (head_dim, itemsize):
                return entry.launches
    return untuned(gpu, head_dim, itemsize)


def can_specialize(gpu: Gpu, head_dim: int, itemsize: int) -> bool:
    """Whether the kernels in Gluon run: they need WGMMA, two bytes an element, rows of 128 bytes, and a
    Triton whose Gluon is known."""
    hopper = (gpu.vendor, gpu.capability) == ("nvidia", (9, 0))
    return hopper and itemsize == 2 and head_dim == 64 and knows_gluon()


def knows_gluon() -> bool:
    """Whether the installed Triton has the Gluon that kernels are written in: each version changes it."""
    try:
        return version("triton").split(".")[:2] in (["3", "6"], ["3", "7"])
    except PackageNotFoundError:  # nightly builds of PyTorch bring it under another name
        return False


def untuned(gpu: Gpu, head_dim: int, itemsize: int) -> Launches:
    """Launches for a GPU that was never measured: as many programs at once as run without spilling much.

    Args:
        gpu: where.
        head_dim: channels per head.
        itemsize: bytes of an element.
    """
    choose = _without_matrix_units if itemsize == 4 else _by_occupancy
    forward, dq, dkv = (choose(gpu, head_dim, kernel) for kernel in _RESIDENT)
    return Launches(forward, forward, dq, dq, dkv, dkv)


_RESIDENT = {"forward": 1, "dq": 2, "dkv": 2}  # tiles of block_m x D that a program keeps
# The fewest registers of a thread with which the compiler spills little, of 4 warps (at 128 channels, of 8):
# `tests/kernels/test_builds.py` compiles for each architecture.
_LEAST_REGISTERS = {
    32: {"forward": 128, "dq": 128, "dkv": 192},
    64: {"forward": 168, "dq": 168, "dkv": 255},
    128: {"forward": 128, "dq": 128, "dkv": 255},
}
_MOST_REGISTERS = 255
_RESERVED = 2 * 1024  # bytes of a program, for masks, statistics, and what the driver takes
_WARP = 32


def _by_occupancy(gpu: Gpu, head_dim: int, kernel: str) -> Launch:
    """In half precision: two stages, and a limit of registers where it lets more programs run at once."""
    # Hopper and its successor for servers multiply from shared memory, which then holds both stages; the
    # others load a stage into registers first. Four warps of theirs make one product of 64 rows.
    from_memory = gpu.vendor == "nvidia" and gpu.capability[0] in (9, 10)
    warps = 4 if head_dim < 128 or (from_memory and kernel != "dkv") else 8
    least = _MOST_REGISTERS if warps == 4 and head_dim == 128 else _LEAST_REGISTERS[head_dim][kernel]
    vector, threads, stages = 2 * head_dim, warps * _WARP, 2
    for block_m, block_n in ((64, 64), (32, 32), (16, 32)):
        buffers = stages if from_memory else stages - 1
        memory = (_RESIDENT[kernel] * block_m + 2 * buffers * block_n) * vector + _RESERVED
        if warps > 4 and not from_memory:  # P and dS pass from warp to warp
            memory += 2 * block_m * block_n
        if memory <= gpu.program_memory:
            break
    programs = min(gpu.sm_memory // memory, gpu.sm_threads // threads, gpu.sm_registers // (least * threads))
    limit = gpu.sm_registers // (max(programs, 1) * threads) // 8 * 8
    capped = gpu.vendor == "nvidia" and limit < _MOST_REGISTERS
    return Launch(block_m, block_n, warps, stages, limit if capped else None)


def _without_matrix_units(gpu: Gpu, head_dim: int, kernel: str) -> Launch:
    """In float32, whose operands live in registers: many warps hold them."""
    for block_m in (64, 32, 16):
        block_n = max(block_m, 32)
        operands = (_RESIDENT[kernel] * block_m + 2 * block_n) * 4 * head_dim
        if operands + 4 * _RESERVED <= gpu.program_memory:
            break
    return Launch(block_m, block_n, num_warps=16, num_stages=1)
