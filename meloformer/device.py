"""The choice of a device and of an attention backend, for every command that computes."""

import torch

from .errors import UserError
from .kernels import resolve_backend


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a --device flag means: auto, cpu, cuda or cuda:N.

    'auto' is CUDA if there is any; 'cuda' is the GPU of number `local_rank`.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UserError(f"--device {name}: take auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def pick_attention(name: str, device: torch.device) -> str:
    """The backend that an --attention flag means on `device`.

    Raises:
        UserError: it cannot run there.
    """
    try:
        return resolve_backend(name, device)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--attention {name}: {error}") from None
