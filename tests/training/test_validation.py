import math

import pytest
import torch

from meloformer.data.augment import OFF
from meloformer.tokens import vocab
from meloformer.training import validation
from meloformer.training.distributed import start_job
from meloformer.training.trainer import Trainer
from meloformer.training.validation import validate

from helpers.tiny_train import TINY
from helpers.training import config


@pytest.fixture
def trainer(data, tmp_path):
    return Trainer(config(data, tmp_path), TINY, start_job("cpu"))


def run(trainer, stops=lambda: False):
    return validate(trainer.stepper, trainer.val_data, 1, trainer.job, stops)


def test_losses_are_means_over_the_targets_of_a_family(trainer):
    found = run(trainer)
    log_p, targets = [], []
    for row in range(trainer.val_data.rows_per_epoch(0)):
        batch = trainer.val_data.batch(0, [row])
        with torch.no_grad():
            logits = trainer.stepper.logits(batch)
        real = batch.targets >= 0
        log_p.append(logits[real].double().log_softmax(-1))
        targets.append(batch.targets[real])
    log_p, targets = torch.cat(log_p), torch.cat(targets)
    nats = -log_p.gather(1, targets[:, None])[:, 0]
    assert found["val_loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(nats.mean().item()), rel=1e-4)
    names, families = set(), [vocab.family_of(int(target)) for target in targets]
    notes = sum(family is vocab.P for family in families)
    assert found["val_nats_per_note"] == pytest.approx(nats.sum().item() / notes, rel=1e-5)
    for family in set(families):
        of = torch.tensor([one is family for one in families])
        names |= {f"val_loss_{family.name}", f"val_within_{family.name}"}
        assert found[f"val_loss_{family.name}"] == pytest.approx(nats[of].mean().item(), rel=1e-5)
        within = nats[of] + log_p[of, family.start : family.stop].logsumexp(1)
        assert found[f"val_within_{family.name}"] == pytest.approx(within.mean().item(), rel=1e-4, abs=1e-6)
    assert {f"val_loss_{name}" for name in ("BAND", "CHORD", "INST", "T", "P", "L", "V", "EOS")} <= names
    assert names == found.keys() - {"val_loss", "val_perplexity", "val_nats_per_note"}
    assert trainer.stepper.model.training


@pytest.mark.parametrize("chunk", [3, 4096])
def test_every_target_counts_once_whatever_the_chunks(chunk, monkeypatch):
    monkeypatch.setattr(validation, "CHUNK", chunk)
    logits = torch.randn(20, vocab.VOCAB_SIZE + 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([*(family.start for family in validation.PREDICTED), -100, -100])
    nats, within, count = validation.family_sums(logits[: len(targets)], targets)
    assert count.tolist() == [1] * len(validation.PREDICTED)
    alone = [family.stop - family.start == 1 for family in validation.PREDICTED]
    assert [w == 0 for w in within.tolist()] == alone and (within < nats).all()


def test_training_samples_alone_are_augmented(trainer):
    assert trainer.data.augmentation == trainer.config.augmentation != OFF
    assert trainer.val_data.augmentation == OFF


def test_a_stop_ends_it_without_figures(trainer):
    asked = []
    assert run(trainer, lambda: bool(asked.append(1) or len(asked) == 2)) is None
    assert len(asked) == 2 and trainer.stepper.model.training


def test_numbers_that_are_not_finite_are_none(trainer, monkeypatch):
    sums = validation.family_sums
    monkeypatch.setattr(validation, "family_sums", lambda *a: sums(*a) * math.inf)
    found = run(trainer)
    assert found["val_loss"] is None and found["val_loss_P"] is None
