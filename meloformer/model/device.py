"""Choice of the device and the attention backend, for every command that runs a model."""

import torch

from ..errors import UserError
from ..kernels import resolve_backend
from .transformer import DENSE, ModelConfig


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a --device flag means: auto, cpu, cuda or cuda:N.

    'auto' is 'cuda' if PyTorch sees a GPU, otherwise 'cpu'; 'cuda' is the GPU with the number `local_rank`.

    Raises:
        UserError: `name` is not one of these, or there is no such device.
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


def pick_attention(name: str, device: torch.device, model: ModelConfig) -> str:
    """The attention backend that an --attention flag means for a model on `device`.

    Raises:
        UserError: the model was trained with other attention, or the backend cannot run on `device`.
    """
    if model.dense:
        if name not in ("auto", DENSE):
            raise UserError(f"--attention {name}: the model is dense: it was trained without summaries")
        return DENSE
    if name == DENSE:
        raise UserError(f"--attention {DENSE}: the model was trained with summaries, and needs them")
    try:
        return resolve_backend(name, device)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--attention {name}: {error}") from None
