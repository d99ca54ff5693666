import math

import pytest
import torch

from meloformer.tokens import attributes
from meloformer.training import validation
from meloformer.training.distributed import start_job
from meloformer.training.trainer import Trainer
from meloformer.training.validation import KINDS, validate

from helpers.tiny_train import TINY
from helpers.training import config


@pytest.fixture
def trainer(data, tmp_path):
    return Trainer(config(data, tmp_path), TINY, start_job("cpu"))


def run(trainer, stops=lambda: False):
    return validate(trainer.stepper, trainer.val_data, 1, trainer.job, stops)


def test_loss_by_kind_is_the_mean_over_the_targets_of_that_kind(trainer):
    found = run(trainer)
    nats, kinds = [], []
    for row in range(trainer.val_data.rows_per_epoch(0)):
        batch = trainer.val_data.batch(0, [row])
        with torch.no_grad():
            logits = trainer.stepper.model(batch.ids, batch.structure, "reference")
        counts = batch.targets >= 0
        nats.append(
            torch.nn.functional.cross_entropy(logits[counts], batch.targets[counts], reduction="none")
        )
        kinds.append(torch.from_numpy(attributes.KIND_OF_ID)[batch.targets[counts]])
    nats, kinds = torch.cat(nats), torch.cat(kinds)
    assert found["val_loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    for name, kind in KINDS.items():
        of_kind = nats[kinds == kind].mean().item()
        assert found[f"val_loss_{name}"] == pytest.approx(of_kind, rel=1e-5)
        assert found[f"val_perplexity_{name}"] == pytest.approx(math.exp(of_kind), rel=1e-4)
    assert set(KINDS) == {"T", "P", "L", "V", "structural"}
    assert trainer.stepper.model.training


def test_a_stop_ends_it_without_figures(trainer):
    asked = []
    assert run(trainer, lambda: bool(asked.append(1) or len(asked) == 2)) is None
    assert len(asked) == 2 and trainer.stepper.model.training


def test_numbers_that_are_not_finite_are_none(trainer, monkeypatch):
    loss = validation.next_token_loss
    monkeypatch.setattr(validation, "next_token_loss", lambda *a: (loss(*a)[0] * math.inf, loss(*a)[1]))
    found = run(trainer)
    assert found["val_loss"] is None and found["val_perplexity_P"] is None
