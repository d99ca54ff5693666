"""`python -m meloformer.train`: train a model on preprocessed songs, with one process or many."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from . import cli
from .errors import UserError
from .files import check_can_write, exclusive_lock, require_locks
from .model.transformer import SIZES, ModelConfig
from .stop import STOPPED, StopRequest
from .training.config import TrainConfig, chosen_model, parse_args
from .training.distributed import Job, start_job
from .training.dry_run import dry_run
from .training.estimate import is_out_of_memory, out_of_memory
from .training.trainer import Trainer

_LOCK = ".lock"


def train(config: TrainConfig, model_config: ModelConfig | None = None) -> str | None:
    """Train by `config`.

    Args:
        model_config: replaces the preset of `config.model_size`. Its attention is set by `config` either way,
            see `chosen_model`.

    Returns:
        None if the run is finished, else what requested the stop.

    Raises:
        UserError: an error that the user can fix.
        DivergedError: loss, gradients or weights are not finite.
    """
    model_config = chosen_model(config, model_config or SIZES[config.model_size])
    with StopRequest("will save after this step and stop; Ctrl-C stops without saving") as stop:
        if config.deterministic:
            _make_deterministic()
        job = start_job(config.device)
        try:
            with _user_errors(config, job):
                if not config.dry_run:  # before the model is built, which takes long
                    job.run_on_rank0(lambda: check_can_write(Path(config.output_dir)))
                trainer = Trainer(config, model_config, job, lambda: stop.reason)
                if config.dry_run:
                    dry_run(trainer)
                    reason = None
                else:
                    with _lock_output(trainer.output, job):
                        reason = trainer.run()
            # With it goes the reducer of DDP, before the process group: as its last owner it would end the
            # group's threads while it holds Python's lock, for which one of them may wait (PyTorch 2.13).
            del trainer
        except BaseException as error:
            job.fail(error)
            raise
        job.leave()
        return reason


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the run is finished, `STOPPED` if it was stopped on request."""
    config = parse_args(argv)
    require_locks()
    return 0 if train(config) is None else STOPPED


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def _lock_output(folder: Path, job: Job) -> Iterator[None]:
    """Collective: lock the output folder against other runs."""
    with contextlib.ExitStack() as held:

        def lock() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            taken = f"{folder}: another training run is writing there"
            held.enter_context(exclusive_lock(folder / _LOCK, taken))

        job.run_on_rank0(lock)
        yield


@contextlib.contextmanager
def _user_errors(config: TrainConfig, job: Job) -> Iterator[None]:
    """Turns a lack of memory and errors of the file system into UserErrors."""
    try:
        yield
    except OSError as error:  # no permission, a full disk, a file where a folder should be
        raise UserError(f"{error.filename or config.output_dir}: {error.strerror or error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(config, job.device, job.world) from error


if __name__ == "__main__":
    cli.run(main)
