"""Counters of the blocks that are split among programs: zeros, which kernels leave as they found them.

To fill them anew for each call is a launch more, which the kernels of a short row would wait for. So zeros
are kept for each stream, whose kernels use them one after the other. (A stream is known by its address: one
that was made outside of PyTorch must have no work left when it is destroyed.)
"""

import torch
from torch import Tensor

from .launch_cache import current_stream

_ROOM = 1 << 18  # counters: a megabyte for each stream, and more than most rows need
_kept: dict[tuple[torch.device, int], Tensor] = {}


def keep(device: torch.device) -> None:
    """Keep zeros for the current stream, unless it is captured.

    To be called where memory is the caller's own, not of a CUDA graph that PyTorch records or warms up
    (`torch.compile` with mode="reduce-overhead").
    """
    if _may_keep(device) and (key := (device, current_stream(device.index))) not in _kept:
        with torch.inference_mode(False):  # what is kept may be used outside of it
            _kept[key] = torch.zeros(_ROOM, dtype=torch.int32, device=device)


def zeros(count: int, device: torch.device) -> Tensor:
    """Int32 [count or more]. Those of a CUDA graph are its own, since it may be replayed on any stream."""
    if _may_keep(device) and count <= _ROOM:
        found = _kept.get((device, current_stream(device.index)))
        if found is not None:
            return found
    return torch.zeros(count, dtype=torch.int32, device=device)


def _may_keep(device: torch.device) -> bool:
    if device.type != "cuda" or device.index != torch.cuda.current_device():
        return False
    return not torch.cuda.is_current_stream_capturing()
