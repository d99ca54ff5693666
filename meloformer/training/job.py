"""The processes of a training job: this one's place among them, what they agree on, how they fail.

Gradients and sums travel by NCCL or gloo with a short patience; what one process does for all, as
saving or sampling, is waited for by a gloo group of its own with a long one.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

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
