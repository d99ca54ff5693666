"""`python -m meloformer.train`: packed songs -> a trained model, on one process or many.

One optimizer step takes the next `world x batch_size x accumulation` rows of the epoch. Losses and
gradients are sums over targets, divided once by the number of targets of all processes, so that the
same rows give the same step however they are dealt out.
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import cli, vocab
from .checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from .data import Batch, PackedSongs, State, prefetch
from .device import pick_attention, pick_device
from .errors import UserError
from .kernels import BACKENDS
from .model import SIZES, MeloFormer, ModelConfig, next_token_loss
from .shards import ShardSet

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
DIVERGED = "lower --learning_rate, or try --precision fp32"
MIN_LR_SHARE = 0.1  # the cosine ends at this share of the peak learning rate
MAX_WARMUP_SHARE = 0.1  # a short run warms up for at most this share of its steps


@dataclass(frozen=True)
class TrainConfig:
    """What `python -m meloformer.train` takes; see its --help."""

    data_dir: str
    output_dir: str = "runs/train"
    model_size: str = "base"
    max_seq_len: int = 24576
    max_bars: int = 2048
    max_samples: int | None = None
    batch_size: int = 4
    gradient_accumulation_steps: int = 8
    learning_rate: float = 3e-4
    warmup_steps: int = 500
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    epochs: int = 100
    max_steps: int | None = None
    attention: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    save_every: int | None = None
    keep_last: int = 3
    resume: str | None = None


@dataclass(frozen=True)
class Job:
    """This process among those of the job."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    default = TrainConfig(data_dir="")
    parser = cli.Parser(prog="python -m meloformer.train", description="Train a model on preprocessed songs.")
    add = parser.add_argument
    add("--data_dir", required=True, help="folder that meloformer.preprocess wrote")
    add("--output_dir", default=default.output_dir, help="log and checkpoints go here")
    add("--model_size", default=default.model_size, choices=SIZES, help="size of the model")
    add("--max_seq_len", type=cli.positive_int, default=default.max_seq_len, help="tokens per row")
    add("--max_bars", type=cli.positive_int, default=default.max_bars, help="skip songs with more bars")
    add(
        "--max_samples",
        type=cli.positive_int,
        help="use only so many samples of each split",
    )
    add("--batch_size", type=cli.positive_int, default=default.batch_size, help="rows per process")
    add(
        "--gradient_accumulation_steps",
        type=cli.positive_int,
        default=default.gradient_accumulation_steps,
        help="batches per optimizer step",
    )
    add(
        "--learning_rate",
        type=cli.number(1e-9, 10),
        default=default.learning_rate,
        help="peak of the schedule",
    )
    add(
        "--warmup_steps",
        type=cli.integer(0),
        default=default.warmup_steps,
        help="steps of linear warm-up, at most a tenth of the run; a cosine follows",
    )
    add(
        "--weight_decay",
        type=cli.number(0, 10),
        default=default.weight_decay,
        help="of AdamW, on matrices only",
    )
    add(
        "--max_grad_norm",
        type=cli.number(1e-9, 1e9),
        default=default.max_grad_norm,
        help="clip gradients here",
    )
    add("--epochs", type=cli.positive_int, default=default.epochs, help="passes over the data")
    add("--max_steps", type=cli.positive_int, help="stop after so many optimizer steps")
    add(
        "--attention",
        default=default.attention,
        choices=["auto", *BACKENDS],
        help="attention backend; auto takes the best for the device",
    )
    add("--device", default=default.device, help="auto, cpu, cuda or cuda:N")
    add(
        "--precision",
        default=default.precision,
        choices=["auto", *PRECISIONS],
        help="auto is bf16 on CUDA and fp32 elsewhere",
    )
    add("--seed", type=cli.seed, default=default.seed, help="of the weights and the order of the data")
    add("--save_every", type=cli.positive_int, help="save every so many steps besides after each epoch")
    add("--keep_last", type=cli.positive_int, default=default.keep_last, help="checkpoints to keep")
    add(
        "--resume",
        nargs="?",
        const="auto",
        help="go on from the newest checkpoint in --output_dir (if there is one), or from the given one",
    )
    return TrainConfig(**vars(parser.parse_args(argv)))


def start_job(device: str) -> Job:
    """Join the processes that torchrun started, if it did, and pick the device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Job(rank, world, chosen)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from the peak to MIN_LR_SHARE of it. `step` counts from 0."""
    warmup = max(1, min(config.warmup_steps, int(MAX_WARMUP_SHARE * total)))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    share = MIN_LR_SHARE + (1 - MIN_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * share


def make_optimizer(model: MeloFormer, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW; only matrices decay, since decaying gains and embedding vectors of rank 1 has no sense."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True if device.type == "cuda" else None
    )


class Log:
    """`log.jsonl`, and TensorBoard beside it where that is installed. Only the lead process has one."""

    def __init__(self, folder: Path, last_step: int):
        self._path = folder / "log.jsonl"
        self._drop_after(last_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1)

    def _drop_after(self, last_step: int) -> None:
        """Forget steps that an interrupted run logged but did not save: they will come again."""
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= last_step:
                        kept.append(line)
                except (ValueError, TypeError, KeyError):
                    break  # the line a killed process was writing
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name not in ("step", "epoch"):
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class Trainer:
    """Everything one process of a run holds. `run` trains to the end."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, job: Job):
        self.config, self.job = config, job
        self.output = Path(config.output_dir)
        self.output.mkdir(parents=True, exist_ok=True)
        precision = config.precision
        if precision == "auto":
            precision = "bf16" if job.device.type == "cuda" else "fp32"
        self.autocast_dtype = PRECISIONS[precision]
        self.attention = pick_attention(config.attention, job.device)

        shards = ShardSet(config.data_dir)
        limits = {"max_seq_len": config.max_seq_len, "max_bars": config.max_bars, "seed": config.seed}
        limits["near_bars"] = model_config.near_bars
        self.data = PackedSongs(shards, "train", max_samples=config.max_samples, **limits)
        self.data.require_samples()
        self.val_data = PackedSongs(shards, "val", max_samples=config.max_samples, **limits)
        # What must not change when a run is resumed, or its loss curve would be another run's.
        self.identity = {
            "model": json.loads(json.dumps(dataclasses.asdict(model_config))),
            "data": hashlib.sha256(shards.digests.tobytes()).hexdigest(),
            "val_split": shards.val_split,
            **{
                name: getattr(config, name)
                for name in (
                    *("seed", "max_seq_len", "max_bars", "max_samples", "epochs", "max_steps"),
                    *("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"),
                )
            },
            "precision": precision,
            "rows_per_step": job.world * config.batch_size * config.gradient_accumulation_steps,
        }

        torch.manual_seed(config.seed)
        self.model = MeloFormer(model_config).to(job.device)
        self.optimizer = make_optimizer(self.model, config, job.device)
        self.state, self.step, self.tokens = State(), 0, 0
        self._restore()
        self.parallel = self.model
        if job.world > 1:
            self.parallel = DistributedDataParallel(
                self.model, device_ids=[job.device.index] if job.device.type == "cuda" else None
            )

        # For the schedule and the progress bar. Epochs are packed anew each, so one may take a step more
        # or less than the first; the run ends by the epochs themselves.
        rows = self.data.rows_per_epoch(0)
        self.total_steps = math.ceil(rows / self.identity["rows_per_step"]) * config.epochs
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def _restore(self) -> None:
        found = latest_checkpoint(self.checkpoints)
        if self.config.resume is None:
            if found is not None:
                raise UserError(
                    f"{self.output} holds a run already: add --resume to go on with it, or choose another "
                    "--output_dir"
                )
            return
        if self.config.resume != "auto":
            newest, found = found, find_checkpoint(Path(self.config.resume))
            if newest is not None and newest.resolve() != found.resolve():
                raise UserError(
                    f"{self.output} holds another checkpoint, {newest.name}: to go on from {found}, choose "
                    "another --output_dir"
                )
        if found is None:
            return
        checkpoint = load_checkpoint(found)
        for name, value in self.identity.items():
            if checkpoint.trainer["identity"].get(name) != value:
                raise UserError(
                    f"cannot resume from {found}: {name} was {checkpoint.trainer['identity'].get(name)!r} "
                    f"there and is {value!r} now"
                )
        self.model.load_state_dict(checkpoint.weights)
        restore_optimizer(found, self.optimizer)
        self.state = State(*checkpoint.trainer["state"])
        self.step, self.tokens = checkpoint.trainer["step"], checkpoint.trainer["tokens"]

    def save(self) -> None:
        """Write a checkpoint; the other processes wait until it is whole."""
        if self.job.leads:
            save_checkpoint(
                self.checkpoints,
                self.step,
                model_state=self.model.state_dict(),
                config=dataclasses.asdict(self.model.config),
                tokenizer_json=vocab.to_json(),
                optimizer_state=self.optimizer.state_dict(),
                trainer={
                    "identity": self.identity,
                    "state": list(self.state),
                    "step": self.step,
                    "tokens": self.tokens,
                    "config": dataclasses.asdict(self.config),
                },
                keep_last=self.config.keep_last,
            )
        if self.job.world > 1:
            dist.barrier()

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum in nats over the targets of a batch, and their number."""
        batch = batch.to(self.job.device)
        dtype = self.autocast_dtype
        with torch.autocast(self.job.device.type, dtype=dtype) if dtype else nullcontext():
            logits = self.parallel(batch.ids, batch.structure, self.attention)
        return next_token_loss(logits, batch.targets)

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss in nats per token over the validation split; None if there is no song in it."""
        if not len(self.val_data.samples):
            return None
        self.model.eval()
        nats = count = 0.0
        batches = self.val_data.batches(
            State(), self.config.batch_size, rank=self.job.rank, world=self.job.world, stop_epoch=1
        )
        for batch, _ in batches:
            batch_nats, batch_count = self.loss(batch)
            nats, count = nats + batch_nats.item(), count + batch_count.item()
        self.model.train()
        nats, count = self.job.sum([nats, count])
        if not math.isfinite(nats):
            raise UserError(f"the validation loss is {nats} after step {self.step}: {DIVERGED}")
        return nats / count

    def train_step(self, batches: list[tuple[Batch, bool]], lr: float) -> dict[str, float]:
        """One optimizer step over batches, each with whether it is the last of the step."""
        nats = count = tokens = 0.0
        for batch, last in batches:
            waits = self.job.world > 1 and not last
            with self.parallel.no_sync() if waits else nullcontext():
                batch_nats, batch_count = self.loss(batch)
                batch_nats.backward()
            nats, count = nats + batch_nats.item(), count + batch_count.item()
            tokens += batch.tokens
        nats, count, tokens = self.job.sum([nats, count, tokens])
        if not math.isfinite(nats):
            raise UserError(f"the loss is {nats} at step {self.step + 1}: {DIVERGED}")
        # DistributedDataParallel has averaged sums over processes: make that the mean over targets.
        gradients = [p.grad for p in self.model.parameters()]
        torch._foreach_mul_(gradients, self.job.world / count)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not math.isfinite(norm.item()):
            raise UserError(f"the gradient is {norm.item()} at step {self.step + 1}: {DIVERGED}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": nats / count, "grad_norm": norm.item(), "tokens": int(tokens)}

    def run(self) -> None:
        config, job = self.config, self.job
        log = Log(self.output, self.step) if job.leads else None
        if job.leads:
            self._describe()
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not job.leads)
        started = time.perf_counter()
        pending: list[tuple[Batch, bool]] = []
        saved_step = self.step
        batches = self.data.batches(
            self.state, config.batch_size, rank=job.rank, world=job.world, stop_epoch=config.epochs
        )
        done = config.max_steps is not None and self.step >= config.max_steps
        for batch, after in prefetch([] if done else batches):
            epoch_ends = after.epoch != self.state.epoch
            last = epoch_ends or len(pending) + 1 == config.gradient_accumulation_steps
            pending.append((batch, last))
            if not last:
                continue
            epoch = self.state.epoch
            lr = learning_rate(self.step, self.total_steps, config)
            figures = self.train_step(pending, lr)
            pending = []
            self.step, self.state = self.step + 1, after
            self.tokens += figures["tokens"]
            stops = self.step == config.max_steps

            now = time.perf_counter()
            record = {"step": self.step, "epoch": epoch, "lr": lr, **figures}
            record["tokens_per_s"] = figures["tokens"] / (now - started)
            started = now
            if log:
                log.write(record)
                bar.set_postfix(
                    loss=f"{record['loss']:.3f}", lr=f"{lr:.1e}", tok_s=f"{record['tokens_per_s']:.0f}"
                )
                bar.update()
            if epoch_ends or stops:
                val_loss = self.validate()
                if log and val_loss is not None:
                    log.write({"step": self.step, "epoch": epoch, "val_loss": val_loss})
                    bar.write(f"epoch {epoch + 1}: validation loss {val_loss:.4f} nats per token")
            if epoch_ends or stops or (config.save_every and self.step % config.save_every == 0):
                self.save()
                saved_step = self.step
                started = time.perf_counter()
            if stops:
                break
        bar.close()
        assert saved_step == self.step, "every run ends after a save"
        if log:
            log.close()
            print(f"{self.step} steps, {self.tokens} tokens; the last checkpoint is in {self.checkpoints}")

    def _describe(self) -> None:
        samples = self.data.samples
        print(
            f"{self.model.config.size} model, {self.model.num_parameters() / 1e6:.1f}M parameters, "
            f"attention '{self.attention}' on {self.job.device}, {self.job.world} process(es)\n"
            f"{len(samples)} training samples in {self.data.rows_per_epoch(0)} rows of "
            f"{self.config.max_seq_len} tokens, {len(self.val_data.samples)} validation samples"
        )
        if samples.skipped_songs or samples.skipped_bars:
            print(
                f"left out: {samples.skipped_songs} songs of more than {self.config.max_bars} bars, "
                f"{samples.skipped_bars} bars longer than a row"
            )
        if not len(self.val_data.samples):
            print("no song fell into the validation split: there will be no validation loss")
        if self.step:
            print(f"resuming after step {self.step}")


def train(config: TrainConfig, model_config: ModelConfig | None = None) -> None:
    """Train as `config` says; `model_config` replaces the preset of `config.model_size`."""
    job = start_job(config.device)
    try:
        Trainer(config, model_config or SIZES[config.model_size], job).run()
    except OSError as error:  # no permission, a full disk, a file where a folder should be
        raise UserError(f"{error.filename or config.output_dir}: {error.strerror or error}") from error
    finally:
        if job.world > 1:
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    train(parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
