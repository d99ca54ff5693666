"""Model, optimizer and one optimizer step, on this process among others.

Losses and gradients are sums over targets, divided once by the number of targets of all processes and
batches, so that the same rows give the same step however they are dealt out.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.store import Checkpoint, restore_optimizer
from ..data.batches import Batch
from ..errors import UserError
from ..kernels.attention import Attention
from ..kernels.dense import CausalAttention
from ..model.device import pick_attention
from ..model.loss import next_token_loss
from ..model.transformer import MeloFormer, ModelConfig
from .config import TrainConfig
from .distributed import Job, gather, local, shard, share, whole
from .flops import training_flops
from .guard import Guard, may_be_taken
from .metrics import StepFigures
from .optim import make_optimizer

_ALL_MB = 1 << 20  # more than any model's gradients
_LEAST_NORM = 1e-6  # is added to the norm before the limit is divided by it, as torch.nn.utils does
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ready(NamedTuple):
    """A batch on the device, its attention, and what a stream waits for before it uses them."""

    batch: Batch
    attention: Attention | CausalAttention
    made: torch.cuda.Event | None = None


class Stepper:
    """Takes optimizer steps: `accumulate` what `prepare` made of the batches of a step, then `update`.

    Attributes:
        model: with its weights by the seed; of a sharded one, this process's share.
        optimizer: over its parameters.
        sharded: whether each process holds a share of the state only.
        guard: which judges every step.
        precision: "fp32" or "bf16".
        attention: name of the backend.
        compiled: whether layers and loss are.
        runs_ahead: whether `update` leaves work to the device while the host goes on.
    """

    def __init__(self, config: TrainConfig, model_config: ModelConfig, job: Job):
        self._config, self._job = config, job
        self.precision = config.precision
        if self.precision == "auto":
            self.precision = "bf16" if job.device.type == "cuda" else "fp32"
        self.attention = pick_attention(config.attention, job.device, model_config)
        torch.manual_seed(config.seed)
        self.model = MeloFormer(model_config, config.checkpoint_activations)
        self.compiled = self._compiles()
        if self.compiled:
            self.model.compile_layers()
        self.sharded = config.shard_state and job.world > 1
        if self.sharded:
            shard(self.model, job)
        else:
            self.model.to(job.device)
        self.runs_ahead = job.device.type == "cuda" and not self.sharded
        self.optimizer = make_optimizer(self.model, config, job.device)
        self.guard = Guard()
        self.parallel = self.model
        if job.world > 1 and not self.sharded:
            self.parallel = DistributedDataParallel(
                self.model,
                device_ids=[job.device.index] if job.device.type == "cuda" else None,
                # On one machine gradients travel in milliseconds: at once, when all are there. Exchanges
                # beside the backward wait for the other GPUs with kernels that take its multiprocessors.
                bucket_cap_mb=_ALL_MB if job.one_machine else None,
                gradient_as_bucket_view=True,
            )
        self._sums = self._no_sums()
        self._aside = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None
        self._current: Ready | None = None
        self._begun: torch.cuda.Event | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def _compiles(self) -> bool:
        # The shapes of the reference follow the batch: it would compile anew for each.
        can = self._job.device.type == "cuda" and self.attention != "reference"
        if self._config.compile and not can:
            raise UserError("--compile: needs a GPU, and another attention than reference")
        return can if self._config.compile is None else self._config.compile

    def prepare(self, batch: Batch) -> Ready:
        """A batch for `accumulate`. Waits for the device only if the batch is there already.

        A GPU does this beside its work on the batch before.
        """
        if self._aside is None:
            return self._prepare(batch)
        if self._begun is not None:  # memory that was freed since is then in use no more
            self._aside.wait_event(self._begun)
        with torch.cuda.stream(self._aside):
            return self._prepare(batch)._replace(made=self._aside.record_event())

    def _prepare(self, batch: Batch) -> Ready:
        moved = batch.to(self._job.device, non_blocking=True)
        # A dense model asks where documents end: of the batch on the host, since the device would stall.
        structure = batch.structure if self.model.config.dense else moved.structure
        return Ready(moved, self.model.attention_for(structure, self.attention))

    def logits(self, batch: Batch) -> Tensor:
        """[B, N, V]. If the state is sharded, all processes must ask at once; else there is no exchange."""
        return self._forward(self.model, self._prepare(batch))

    def _forward(self, model: torch.nn.Module, ready: Ready) -> Tensor:
        batch, attention, made = ready
        if made is not None:
            torch.cuda.current_stream(self._job.device).wait_event(made)
        attention.settle()  # here, for in a compiled model it could not wait
        autocasts = self.compute_dtype != torch.float32
        with torch.autocast(self._job.device.type, self.compute_dtype) if autocasts else nullcontext():
            return model(batch.ids, batch.structure, attention)

    def seed(self, step: int) -> None:
        """Make all that draws random numbers in step `step` draw by the seed, the step and the rank.

        So nothing of them needs to be saved, and another number of processes can go on.
        """
        text = f"{self._config.seed} {step} {self._job.rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big"))

    def accumulate(self, ready: Ready, last: bool, done: Callable[[str], None] = lambda part: None) -> None:
        """Add the gradients of a batch, and its nats, targets and tokens, to those of the step.

        Gradients are exchanged between processes with the `last` batch of the step alone. `done` is
        called after each part: "forward", "backward".
        """
        batch = ready.batch
        if self._aside is not None:
            self._begun = torch.cuda.current_stream(self._job.device).record_event()
            self._current = ready  # held until there is an event behind all work on it
        with self._exchange(last):
            logits = self._forward(self.parallel, ready)
            nats, targets = next_token_loss(logits, batch.targets, self.compiled)
            done("forward")
            nats.backward()
        done("backward")
        self._sums[0] += nats.detach()
        self._sums[1] += targets
        self._sums[2] += batch.tokens
        self._sums[3] += training_flops(self.model.config, batch.counts)

    def _exchange(self, now: bool) -> AbstractContextManager:
        """A context for forward and backward, which exchanges gradients only if they are due `now`."""
        if self.sharded:
            self.model.set_requires_gradient_sync(now)
        elif self._job.world > 1 and not now:
            return self.parallel.no_sync()
        return nullcontext()

    def update(self, lr: float, *flags: bool) -> Callable[[], tuple[StepFigures, list[bool]]]:
        """The optimizer step over what was accumulated.

        It is skipped, on all processes alike, if the loss or the gradient is not finite.

        Returns:
            A function, to be called once: it waits for the step's figures, and for whether any process has
            set each flag. A GPU may be given more to do before.
        """
        own = self._sums.new_zeros(len(flags))
        for flag, place in zip(flags, own):
            if flag:
                place.fill_(1)  # to copy from the host would wait for the device
        sums = self._job.sum(torch.cat([self._sums, own]))
        # The exchange has averaged sums over processes: at once make that the mean over targets and clip it.
        gradients = [parameter.grad for parameter in self.model.parameters()]
        share = self._job.world / sums[1]
        norm = whole(torch.nn.utils.get_total_norm(gradients)) * share
        clip = (self._config.max_grad_norm / (norm + _LEAST_NORM)).clamp(max=1)
        torch._foreach_mul_([local(gradient) for gradient in gradients], (share * clip).float())
        told = _told(torch.cat([sums, norm[None]]))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.runs_ahead:
            # The device judges for itself, by the rule of the guard, before the host is told.
            self.optimizer.found_inf = (~(sums[0] + norm).isfinite()).float()
            self.optimizer.step()
        else:
            numbers = told()
            told = partial(list, numbers)
            if may_be_taken(numbers[0], numbers[-1]):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sums = self._no_sums()
        return lambda: self._figures(*told())

    def _figures(
        self, nats: float, targets: float, tokens: float, flops: float, *others: float
    ) -> tuple[StepFigures, list[bool]]:
        *any_flags, norm = others
        loss = nats / targets
        taken = self.guard.admits(loss, norm)
        spike = self.guard.spike(norm) if taken else None
        return StepFigures(loss, norm, int(tokens), flops, taken, spike), [flag > 0 for flag in any_flags]

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self._job.device.type == "cuda":
            torch.cuda.synchronize(self._job.device)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """The state dicts of model and optimizer, whole, for the lead alone; all processes must ask."""
        return gather(self.model.state_dict(), self._job), gather(self.optimizer.state_dict(), self._job)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take weights and optimizer state from a checkpoint, saved by any number of processes.

        Raises:
            UserError: it has no optimizer state that fits.
        """
        present = self.model.state_dict()
        self.model.load_state_dict(
            {name: share(weight, present[name]) for name, weight in checkpoint.weights.items()}
        )
        restore_optimizer(checkpoint.path, self.optimizer, share)

    def whole_model(self) -> MeloFormer | None:
        """A model that the lead can use alone, None elsewhere if it is sharded; all processes must ask."""
        if not self.sharded:
            return self.model
        weights = gather(self.model.state_dict(), self._job)
        if not self._job.leads:
            return None
        with torch.device("meta"):
            model = MeloFormer(self.model.config)
        model.load_state_dict(weights, assign=True)
        return model.to(self._job.device)

    def _no_sums(self) -> Tensor:
        # nats, targets, tokens, floating-point operations
        return torch.zeros(4, dtype=torch.float64, device=self._job.device)


def _told(numbers: Tensor) -> Callable[[], list[float]]:
    """A function that waits for the numbers, but not for what the device is given to do after this call."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return wait
