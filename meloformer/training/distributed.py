"""The processes of a training job: this one's place among them, what they agree on, how they fail.

Gradients and sums travel by NCCL or gloo with a short patience; what one process does for all, as
saving or sampling, is waited for by a gloo group of its own with a long one.

State sharding (FSDP2, ZeRO-3): each process holds a share of weights, gradients and optimizer state.
A share is a `DTensor`, split along the first dimension. A layer's weights are whole while it computes, and
are gathered anew for its backward. They are gathered in float32, and autocast casts them as it does without
sharding: so a run computes the same with and without, and may be resumed either way. Gathering in bfloat16
would send half the bytes, but would round the gains of the norms; and the next layer's weights travel while
one computes, which on rows of thousands of tokens is long.

State sharding (FSDP2, ZeRO-3): each process holds a share of weights, gradients and optimizer state.

A share is a `DTensor`, split along the first dimension. A layer's weights are whole while it computes, and
are gathered anew for its backward. They are gathered in float32, and autocast casts them as it does without
sharding: so a run computes the same with and without, and may be resumed either way. Gathering in bfloat16
would send half the bytes, but would round the gains of the norms; and the next layer's weights travel while
one computes, which on rows of thousands of tokens is long.
"""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import cli
from ..errors import UserError
from ..model.device import pick_device

TIMEOUT = timedelta(minutes=10)  # for a step of another process, the first one compiles
LEAD_TIMEOUT = timedelta(hours=2)  # for what the lead process does alone


@dataclass(frozen=True)
class Job:
    """This process among those of the job.

    rank: 0 .. world - 1. world: number of processes. device: where this one computes.
    lead_group: what the others wait for the lead with; None if there are no others.
    one_machine: whether all are on this one.
    """

    rank: int
    world: int
    device: torch.device
    lead_group: dist.ProcessGroup | None = None
    one_machine: bool = True

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, in place; `values` is on `device`."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: the same answer in all."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def lead_does(self, work: Callable[[], object]) -> object:
        """Do `work` in the lead process; all get its value (JSON), or the UserError it raised."""
        if self.world == 1:
            return work()
        error = None
        text = b""
        if self.leads:
            try:
                text = json.dumps({"value": work()}).encode()
            except UserError as caught:
                error = caught
                text = json.dumps({"error": str(caught)}).encode()
        length = torch.tensor(len(text))
        dist.broadcast(length, 0, group=self.lead_group)
        # Not broadcast_object_list, which would unpickle what it gets.
        content = torch.frombuffer(bytearray(text.ljust(int(length))), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.lead_group)
        if error is not None:
            raise error
        told = json.loads(content.numpy().tobytes())
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]

    def leave(self) -> None:
        """The end of a job that went well; every process must come here."""
        if self.world > 1:
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """Tell of an error; with other processes, end this one at once.

        An orderly exit would wait for work on the device that waits for the others, who wait for this
        process: the launcher would never see that it failed.
        """
        if self.world == 1:
            return
        code = cli.report(error)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)  # for the summary that torchrun prints
        os._exit(code)


def _attempt() -> int:
    """How many times torchrun has restarted the job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that failed."""
    return _attempt() > 0


def start_job(device: str) -> Job:
    """Join the processes that torchrun started, if it did, and pick the device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        if "OMP_NUM_THREADS" not in os.environ:
            # The loader's tensors are small: a team of threads for each would mostly wait for itself, and on
            # a host with many cores and other runs longer than the GPU computes.
            torch.set_num_threads(1)
    if world == 1:
        return Job(rank, world, chosen)
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun may serve all attempts from one store, with the addresses of dead processes in it.
    store = dist.PrefixStore(f"attempt-{_attempt()}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == world
    return Job(rank, world, chosen, dist.new_group(backend="gloo", timeout=LEAD_TIMEOUT), one_machine)


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
