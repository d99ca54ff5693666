"""`python tests/helpers/tiny_train.py ...`: meloformer.train with tiny models for "small" and "base", and
faults on demand. The one for "base" has as many channels per head as real models, as GPU kernels require.

FAULTS in the environment is a JSON list of {"attempt", "rank", "step", "what"}: what happens to a process
when it begins that step (steps count from 0, attempts are torchrun's restarts). TIMEOUT_S replaces the
timeout of the process group.
"""

import json
import os
import signal
import time
from datetime import timedelta

import numpy as np
import torch

from meloformer import cli, train
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.model.transformer import ModelConfig
from meloformer.training import distributed, stepper, validation
from meloformer.training.distributed import local_tensor

TINY = ModelConfig(layers=2, dim=32, heads=2, ffn=64)
TINY_BASE = ModelConfig(layers=3, dim=128, heads=2, ffn=256)


def refuse_to_read(songs: ShardSet, song: int) -> np.ndarray:
    """In the place of `ShardSet.__getitem__`: songs as if their files had been cut short."""
    raise UserError(f"{songs.name(song)} has been cut short")


def _meet_faults() -> None:
    faults = json.loads(os.environ.get("FAULTS", "[]"))
    rank = int(os.environ.get("RANK", 0))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    mine = {
        fault["step"]: fault["what"]
        for fault in faults
        if (fault["rank"], fault["attempt"]) == (rank, attempt)
    }
    now = ""
    seed, loss, validate = stepper.Stepper.seed, stepper.weighted_loss, validation._add_up

    def seed_and_fail(self, step):
        nonlocal now
        seed(self, step)
        now = mine.get(step, "")
        if now == "raise":
            raise RuntimeError(f"the fault of step {step}")
        if now == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if now == "inf weight":
            with torch.no_grad():
                local_tensor(next(self.model.parameters())).fill_(torch.inf)
        if now == "hang":
            time.sleep(1000)
        if now == "SIGINT twice":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        if now in ("SIGINT", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[now])
        if now == "unread":
            ShardSet.__getitem__ = refuse_to_read
        if now == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    def loss_or_nan(*args):
        sums = loss(*args)
        if now == "nan loss":
            return sums._replace(objective=sums.objective * float("nan"), nats=sums.nats * float("nan"))
        if now == "inf gradient":
            sums.objective.register_hook(lambda gradient: gradient * float("inf"))
        return sums

    def validate_and_fail(*args):
        if now.endswith("validation"):
            os.kill(os.getpid(), signal.Signals[now.split()[0]])
        return validate(*args)

    stepper.Stepper.seed = seed_and_fail
    stepper.weighted_loss = loss_or_nan
    validation._add_up = validate_and_fail


def main(argv: list[str] | None = None) -> int:
    train.SIZES |= {"small": TINY, "base": TINY_BASE}
    if "TIMEOUT_S" in os.environ:
        distributed.TIMEOUT = timedelta(seconds=float(os.environ["TIMEOUT_S"]))
    _meet_faults()
    return train.main(argv)


if __name__ == "__main__":
    cli.run(main)
