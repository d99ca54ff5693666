"""Model, optimizer and one optimizer step, on this process among others.

Losses and gradients are sums over targets, divided once by the number of targets of all processes and
batches, so that the same rows give the same step however they are distributed.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.files import OPTIMIZER, damaged
from ..checkpoint.store import Checkpoint, restore_optimizer
from ..data.batches import Batch
from ..errors import UserError
from ..kernels.attention import Attention
from ..kernels.dense import CausalAttention
from ..kernels.dense_choice import fastest_way
from ..kernels.structure import Structure
from ..model.device import pick_attention
from ..model.instrument_mask import forbidden_instruments
from ..model.loss import weighted_loss
from ..model.transformer import Context, MeloFormer, ModelConfig
from ..tokens import vocab
from .config import TrainConfig
from .distributed import Job, full_tensor, gather_state, local_tensor, shard_like, shard_model
from .family_weights import weight_table
from .flops import training_flops
from .guard import Guard, is_finite_step
from .metrics import StepFigures
from .optimizer import make_optimizer
from .replay import Replayed

_ONE_BUCKET_MB = 1 << 20  # more than any model's gradients
_NORM_EPSILON = 1e-6  # is added to the norm before the limit is divided by it, as torch.nn.utils does
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PreparedBatch(NamedTuple):
    """A batch on the device with all that does not depend on weights.

    Attributes:
        attention, context: for `MeloFormer.forward`.
        forbidden: see `forbidden_instruments`.
        ready: the event a stream waits for before it uses any of it.
    """

    batch: Batch
    attention: Attention | CausalAttention
    context: Context
    forbidden: Tensor
    ready: torch.cuda.Event | None = None


class Stepper:
    """Takes optimizer steps: `accumulate` what `prepare` made of the batches of a step, then `update`.

    Attributes:
        model: initialised by the seed; if sharded, this process's shard.
        optimizer: over its parameters.
        sharded: whether each process holds only a shard of the state.
        guard: decides whether a step is taken or skipped.
        precision: "fp32" or "bf16".
        attention: name of the backend.
        dense_way: what computes the attention of a dense model, one of `kernels.dense.WAYS`: measured at the
            first batch; None before, and where PyTorch decides.
        compiled: whether layers and loss are compiled.
        runs_ahead: whether `update` returns before the device has finished the step.
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
            shard_model(self.model, job)
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
                bucket_cap_mb=_ONE_BUCKET_MB if job.one_machine else None,
                gradient_as_bucket_view=True,
            )
        weights = weight_table(config.family_weights)
        self._weights = None if weights is None else weights.to(job.device)
        self._sums = self._zero_sums()
        self._side_stream = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None
        self._replayed = Replayed()
        self.dense_way: str | None = None
        self._dense_times: dict[str, float | str] | None = None  # None: not measured yet
        self._in_use: PreparedBatch | None = None
        self._forward_started: torch.cuda.Event | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def _compiles(self) -> bool:
        # The shapes of the reference follow the batch: it would compile anew for each.
        can = self._job.device.type == "cuda" and self.attention != "reference"
        if self._config.compile and not can:
            raise UserError("--compile: needs a GPU, and another attention than reference")
        return can if self._config.compile is None else self._config.compile

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Move a batch to the device, plan its attention and read its context, for `accumulate`.

        On a GPU this runs on a stream of its own, beside the work on the batch before. It synchronizes only
        if the batch is on the device already.
        """
        if self._side_stream is None:
            return self._prepare(batch)
        if self._forward_started is not None:  # memory freed since then is no longer in use
            self._side_stream.wait_event(self._forward_started)
        read = partial(self._replayed, self._read, kind=self.model.training)
        with torch.cuda.stream(self._side_stream):
            return self._prepare(batch, read)._replace(ready=self._side_stream.record_event())

    def _read(self, ids: Tensor, structure: Structure) -> tuple[Context, Tensor]:
        return self.model.read(ids, structure), forbidden_instruments(ids, structure)

    def _prepare(self, batch: Batch, read: Callable | None = None) -> PreparedBatch:
        """`read`: in place of `_read`, which it calls or replays."""
        moved = batch.to(self._job.device, non_blocking=True)
        ids, structure = moved.ids, moved.structure
        if self.model.config.dense:
            # The document boundaries are needed on the host: reading them from the device would stall it.
            if self._dense_times is None:
                self._choose_dense_way(batch.structure)
            attention = CausalAttention(batch.structure, self._job.device, self.dense_way)
        else:
            attention = self.model.attention_for(structure, self.attention)
        return PreparedBatch(moved, attention, *(read or self._read)(ids, structure))

    def _choose_dense_way(self, structure: Structure) -> None:
        model, device = self.model.config, self._job.device
        self.dense_way, self._dense_times = fastest_way(
            structure, model.heads, model.head_dim, self.compute_dtype, device, model.layers
        )
        if self._dense_times and self._job.is_rank0:
            each = "; ".join(
                f"{way}: {found if isinstance(found, str) else f'{found:.1f} ms'}"
                for way, found in self._dense_times.items()
            )
            print(f"dense attention by '{self.dense_way}', the fastest for these documents ({each})")

    def logits(self, batch: Batch) -> Tensor:
        """Logits [B, N, V] of a batch; -inf where instruments are forbidden. Collective if sharded."""
        return self._forward(self.model, self._prepare(batch))

    def _forward(self, model: torch.nn.Module, prepared: PreparedBatch) -> Tensor:
        batch, attention, context, forbidden, ready = prepared
        if ready is not None:
            torch.cuda.current_stream(self._job.device).wait_event(ready)
        attention.finalize()  # may synchronize, which compiled code cannot
        autocasts = self.compute_dtype != torch.float32
        with torch.autocast(self._job.device.type, self.compute_dtype) if autocasts else nullcontext():
            logits = model(batch.ids, batch.structure, attention, context)
        with torch.no_grad():  # the gradient of what has no probability is 0 anyway
            logits[..., vocab.INST.start : vocab.INST.stop].masked_fill_(forbidden, -torch.inf)
        return logits

    def seed(self, step: int) -> None:
        """Seed every random generator by the run's seed, the step and the rank.

        So no generator state needs to be saved, and another number of processes can resume.
        """
        text = f"{self._config.seed} {step} {self._job.rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big"))

    def accumulate(
        self, prepared: PreparedBatch, last: bool, done: Callable[[str], None] = lambda part: None
    ) -> None:
        """One accumulation step: add a batch's gradients, nats, targets and tokens to those of the step.

        Args:
            last: whether it is the last batch of the step; gradients are exchanged between processes then
                only.
            done: called with "forward" and "backward" after each.
        """
        batch = prepared.batch
        if self._side_stream is not None:
            self._forward_started = torch.cuda.current_stream(self._job.device).record_event()
            self._in_use = prepared  # keeps its memory until an event follows all work on it
        with self._exchange(last):
            logits = self._forward(self.parallel, prepared)
            loss = weighted_loss(logits, batch.targets, self._weights, self.compiled)
            done("forward")
            loss.objective.backward()
        done("backward")
        self._sums[0] += loss.nats
        self._sums[1] += loss.count
        self._sums[2] += batch.tokens
        self._sums[3] += training_flops(self.model.config, batch.counts)
        self._sums[4] += loss.weight
        if batch.unread:  # the loss is not finite then, so no process takes the step
            self._sums[0].fill_(math.nan)
            self._sums[5].fill_(1)

    def _exchange(self, now: bool) -> AbstractContextManager:
        """A context for forward and backward in which gradients are exchanged only if `now`."""
        if self.sharded:
            self.model.set_requires_gradient_sync(now)
        elif self._job.world > 1 and not now:
            return self.parallel.no_sync()
        return nullcontext()

    def update(self, lr: float, *flags: bool) -> Callable[[], tuple[StepFigures, list[bool]]]:
        """Collective: the optimizer step over the accumulated gradients, skipped on all ranks if the loss or
        the gradient norm is not finite, or if a batch of the step is `unread`.

        Args:
            lr: learning rate.
            flags: of this process; combined over all processes.

        Returns:
            A function, to be called once: it waits for the device and returns the step's figures and, for
            each flag, whether any process has set it. More work may be given to the device before.
        """
        own = self._sums.new_zeros(len(flags))
        for flag, place in zip(flags, own):
            if flag:
                place.fill_(1)  # a copy from the host would synchronize
        sums = self._job.sum(torch.cat([self._sums, own]))
        # The exchange averaged over processes: scale to the weighted mean over targets and clip in one pass.
        gradients = [parameter.grad for parameter in self.model.parameters()]
        scale = self._job.world / sums[4]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients)) * scale
        clip = (self._config.max_grad_norm / (norm + _NORM_EPSILON)).clamp(max=1)
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], (scale * clip).float())
        read_numbers = _read_later(torch.cat([sums, norm[None]]))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.runs_ahead:
            # The device applies the guard's rule itself, before the host knows the numbers.
            self.optimizer.found_inf = (~(sums[0] + norm).isfinite()).float()
            self.optimizer.step()
        else:
            numbers = read_numbers()
            read_numbers = partial(list, numbers)
            if is_finite_step(numbers[0], numbers[-1]):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sums = self._zero_sums()
        return lambda: self._figures(*read_numbers())

    def _figures(
        self,
        nats: float,
        targets: float,
        tokens: float,
        flops: float,
        weight: float,
        unread: float,
        *others: float,
    ) -> tuple[StepFigures, list[bool]]:
        *numbers, norm = others
        any_flags = [number > 0 for number in numbers]
        if unread:  # the guard does not count the step: it will be taken after a resume
            return StepFigures(math.nan, math.nan, 0, 0.0, False, None, unread=True), any_flags
        loss = nats / targets
        taken = self.guard.admits(loss, norm)
        spike = self.guard.spike(norm) if taken else None
        return StepFigures(loss, norm, int(tokens), flops, taken, spike), any_flags

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self._job.device.type == "cuda":
            torch.cuda.synchronize(self._job.device)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Collective: full state dicts of model and optimizer, meaningful on rank 0."""
        return gather_state(self.model.state_dict(), self._job), gather_state(
            self.optimizer.state_dict(), self._job
        )

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint of the same model, saved by any number of processes."""
        present = self.model.state_dict()
        self.model.load_state_dict(
            {name: shard_like(weight, present[name]) for name, weight in checkpoint.weights.items()}
        )

    def load_optimizer(self, checkpoint: Checkpoint, steps: int) -> None:
        """Take the optimizer state of a checkpoint, saved by any number of processes.

        Args:
            steps: that the optimizer has taken.

        Raises:
            UserError: it has none that fits.
        """
        restore_optimizer(checkpoint.path, self.optimizer, shard_like)
        if steps and not self.optimizer.state:
            raise damaged(checkpoint.path / OPTIMIZER, f"it is empty after {steps} steps")
        for state in self.optimizer.state.values():
            if (its := state["step"].item()) not in range(1, steps + 1):
                raise damaged(checkpoint.path / OPTIMIZER, f"it is of step {its:g}, after {steps} steps")

    def whole_model(self) -> MeloFormer | None:
        """Collective: a model that rank 0 can use alone; None on other ranks if the state is sharded."""
        if not self.sharded:
            return self.model
        weights = gather_state(self.model.state_dict(), self._job)
        if not self._job.is_rank0:
            return None
        with torch.device("meta"):
            model = MeloFormer(self.model.config)
        model.load_state_dict(weights, assign=True)
        return model.to(self._job.device)

    def _zero_sums(self) -> Tensor:
        # nats, targets, tokens, floating-point operations, weights of targets, processes that could not read
        return torch.zeros(6, dtype=torch.float64, device=self._job.device)


def _read_later(numbers: Tensor) -> Callable[[], list[float]]:
    """A function that returns the numbers: it waits for them, but not for device work queued after this
    call."""
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
