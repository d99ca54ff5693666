"""How the update kernels are launched: as measured, where someone measured; safely everywhere else."""

from contextlib import contextmanager
from functools import cache

import torch

from .launch import Launches, safe
from .tuned import TABLE

_override: list[Launches] = []


@contextmanager
def override(launches: Launches):
    """Launch like this inside the context, whatever the table says: for tests and the tuner."""
    _override.append(launches)
    try:
        yield
    finally:
        _override.pop()


def launches_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Launches:
    """The launches of the table for this GPU, or safe ones that fit its shared memory."""
    return _override[-1] if _override else _chosen(device, dtype, head_dim)


@cache
def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> Launches:
    if device.type != "cuda":
        return Launches()
    properties = torch.cuda.get_device_properties(device)
    for entry in TABLE:
        if (entry.capability, entry.head_dim, entry.itemsize) == (
            (properties.major, properties.minor),
            head_dim,
            dtype.itemsize,
        ):
            return entry.launches
    return safe(head_dim, dtype.itemsize, properties.shared_memory_per_block_optin)
