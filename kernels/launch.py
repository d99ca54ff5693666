"""What a launch of an update kernel is made of, and safe ones for GPUs that nobody measured."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Launch:
    """Rows of a line that a program takes, columns it takes at a time, warps, depth of the pipeline, and
    the most registers a thread may have (fewer let more programs run at once), None to leave it open."""

    rows: int = 64
    columns: int = 64
    warps: int = 4
    stages: int = 3
    registers: int | None = None

    def __post_init__(self):
        if self.rows not in (16, 32, 64):
            raise ValueError(f"a program takes 16, 32 or 64 rows of a line, got {self.rows}")
        if self.columns not in (32, 64, 128):
            raise ValueError(f"a program takes 32, 64 or 128 columns at a time, got {self.columns}")


@dataclass(frozen=True)
class Launches:
    """One launch for each kernel of the update phase and pass."""

    forward_near: Launch = Launch()
    forward_far: Launch = Launch()
    dq_near: Launch = Launch()
    dq_far: Launch = Launch()
    dkv_near: Launch = Launch()
    dkv_far: Launch = Launch()

    @classmethod
    def all(cls, launch: Launch) -> "Launches":
        return cls(*[launch] * 6)


@dataclass(frozen=True)
class Entry:
    """Launches measured on one family of GPUs, for one head_dim and size of the elements in bytes."""

    capability: tuple[int, int]
    head_dim: int
    itemsize: int
    launches: Launches
    gpu: str
    date: str


def safe(head_dim: int, itemsize: int, shared_memory: int) -> Launches:
    """Launches for a GPU that was never measured, chosen by the shared memory that they need.

    Args:
        shared_memory: bytes a program may use.
    """
    forward = _fitting(head_dim, itemsize, shared_memory, resident=1)
    backward = _fitting(head_dim, itemsize, shared_memory, resident=2)
    return Launches(forward, forward, backward, backward, backward, backward)


def _fitting(head_dim: int, itemsize: int, limit: int, resident: int) -> Launch:
    """The largest tile whose operands fit: `resident` rows x D for the program, two columns x D a stage.

    In float32, whose products use no matrix units, the operands live in registers: more warps hold them.
    """
    launch = Launch(warps=16 if itemsize == 4 else 4)
    vector = head_dim * itemsize
    for side, stages in ((64, 3), (64, 2), (64, 1), (32, 2), (32, 1), (16, 1)):
        columns = max(side, 32)
        if (resident * side + 2 * stages * columns) * vector + _SPARE <= limit:
            return replace(launch, rows=side, columns=columns, stages=1 if itemsize == 4 else stages)
    return replace(launch, rows=16, columns=32, stages=1)


_SPARE = 8 * 1024  # for masks, statistics and the exchange of layouts
