"""The processes of a training job: what they agree on, how they fail, and how they split the state.

Gradients and sums travel by NCCL or gloo with a short timeout. What rank 0 does for all, such as saving or
sampling, is waited for in a gloo group of its own with a long one.

State sharding is FSDP2 (ZeRO-3): each process holds a shard of weights, gradients and optimizer state, as
`DTensor`s split along the first dimension. A layer's weights are gathered while it computes, and again for
its backward. They are gathered in float32 and cast by autocast, as without sharding, so that a run computes
the same either way and may be resumed either way. Gathering in bfloat16 would send half the bytes, but round
the gains of the norms; and the next layer's weights travel while one layer computes, which takes long on long
rows.
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
RANK0_TIMEOUT = timedelta(hours=2)  # for what rank 0 does alone


@dataclass(frozen=True)
class Job:
    """This process among those of the job.

    Attributes:
        rank: 0 .. world - 1.
        world: number of processes.
        device: where this process computes.
        rank0_group: the group in which the others wait for rank 0; None if there are no others.
        one_machine: whether all processes run on one machine.
        local_rank, local_world: this process among those on its machine.
    """

    rank: int
    world: int
    device: torch.device
    rank0_group: dist.ProcessGroup | None = None
    one_machine: bool = True
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce: `values`, on `device`, become their sums over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Collective: whether the flag is set in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def run_on_rank0(self, work: Callable[[], object]) -> object:
        """Collective: run `work` on rank 0 and return its result (a JSON value) on every rank.

        Raises:
            UserError: on every rank, if `work` raised one.
        """
        if self.world == 1:
            return work()
        error = None
        text = b""
        if self.is_rank0:
            try:
                text = json.dumps({"value": work()}).encode()
            except UserError as caught:
                error = caught
                text = json.dumps({"error": str(caught)}).encode()
        length = torch.tensor(len(text))
        dist.broadcast(length, 0, group=self.rank0_group)
        # Not broadcast_object_list, which would unpickle what it gets.
        content = torch.frombuffer(bytearray(text.ljust(int(length))), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.rank0_group)
        if error is not None:
            raise error
        result = json.loads(content.numpy().tobytes())
        if "error" in result:
            raise UserError(result["error"])
        return result["value"]

    def leave(self) -> None:
        """Collective: end a job that succeeded."""
        if self.world > 1:
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """Report an error; if there are other processes, end this one at once.

        An orderly exit would wait for device work that waits for the other processes, which wait for this
        one: the launcher would never see that it failed.
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
    local_rank, local_world = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    chosen = pick_device(device, local_rank)
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
    rank0_group = dist.new_group(backend="gloo", timeout=RANK0_TIMEOUT)
    return Job(rank, world, chosen, rank0_group, local_world == world, local_rank, max(1, local_world))


def shard_model(model: nn.Module, job: Job) -> None:
    """Keep only this process's shard of `model`, on its device: layer by layer, then what is in no layer.

    Args:
        model: has `layers`; equal in all processes, and on the CPU, so that no device holds all of it.
    """
    # The last layer returns its summaries unchanged, a view; nothing reads or writes them afterwards.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(job.device.type, (job.world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """Collective: the full tensor of a shard; any other tensor is full already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_state(state: dict, job: Job) -> dict:
    """Collective: a state dict, nested dicts included, with full tensors on the CPU of rank 0.

    One tensor at a time, so that no device holds more than one full tensor. On other ranks the values are
    meaningless.
    """
    gathered = {}
    for name, value in state.items():
        if isinstance(value, dict):
            value = gather_state(value, job)
        elif isinstance(value, DTensor):
            value = full_tensor(value)
            value = value.cpu() if job.is_rank0 else None
        gathered[name] = value
    return gathered


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a full tensor that all processes have read, if `like` is a shard."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
