"""State sharding (FSDP2, ZeRO-3): each process holds a share of weights, gradients and optimizer state.

A share is a `DTensor`, split along the first dimension. A layer's weights are whole while it computes, and
are gathered anew for its backward. They are gathered in float32, and autocast casts them as it does without
sharding: so a run computes the same with and without, and may be resumed either way. Gathering in bfloat16
would send half the bytes, but would round the gains of the norms; and the next layer's weights travel while
one computes, which on rows of thousands of tokens is long.
"""

import warnings

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .job import Job


def shard(model: nn.Module, job: Job) -> None:
    """Leave this process its share of `model`, on its device; layer by layer, then what is in no layer.

    Args:
        model: with `layers`; equal in all processes, and on the CPU, so that no device holds all of it.
    """
    # The last layer hands its summaries on untouched; nobody reads them, let alone writes to them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(job.device.type, (job.world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this is a share; all processes must ask. Any other tensor is whole already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(state: dict, job: Job) -> dict:
    """A state dict, dicts in it included, whole on the CPU of the lead; all processes must ask.

    One tensor after the other, so that no device holds more than one whole. In the other processes the
    values mean nothing.
    """
    gathered = {}
    for name, value in state.items():
        if isinstance(value, dict):
            value = gather(value, job)
        elif isinstance(value, DTensor):
            value = whole(value)
            value = value.cpu() if job.leads else None
        gathered[name] = value
    return gathered


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor that all have read alike, if `like` is a share."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
