"""Weights of the loss by family: how they are written, and that training follows them."""

import argparse

import pytest
import torch

from meloformer.data.batches import State
from meloformer.tokens import vocab
from meloformer.training.distributed import start_job
from meloformer.training.family_weights import DEFAULT_WEIGHTS, PREDICTED, parse_weights, weight_table
from meloformer.training.trainer import Trainer

from helpers.tiny_train import TINY
from helpers.training import config


@pytest.mark.parametrize(
    "text, normal",
    [
        ("", ""),
        ("INST=1", ""),
        (" inst=2 , CHORD=1.50", "CHORD=1.5,INST=2"),
        ("P=0", "P=0"),
        ("INST=2,INST=3", "INST=3"),
    ],
)
def test_a_text_has_one_normal_form(text, normal):
    assert parse_weights(text) == normal and parse_weights(normal) == normal
    table = weight_table(normal)
    assert (table is None) == (normal == "")


def test_the_default_is_in_its_normal_form():
    assert parse_weights(DEFAULT_WEIGHTS) == DEFAULT_WEIGHTS
    table = weight_table(DEFAULT_WEIGHTS)
    assert table.shape == (vocab.VOCAB_SIZE,)
    assert {float(w) for w in table[vocab.INST.start : vocab.INST.stop]} == {2.0}
    assert table[vocab.P.start] == 1 and "PAD" not in {family.name for family in PREDICTED}


@pytest.mark.parametrize(
    "text", ["X=2", "INST", "INST=", "INST=-1", "INST=nan", "INST=1e9", "PAD=2", "INST=2=3"]
)
def test_what_is_no_weight_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_weights(text)


def gradients(data, tmp_path, text: str) -> tuple[float, list[torch.Tensor]]:
    """The loss that is told, and the gradients as the optimizer has them, of a step of two batches."""
    settings = config(data, tmp_path, family_weights=text, max_grad_norm=1e9)
    trainer = Trainer(settings, TINY, start_job("cpu"))
    stepper, found = trainer.stepper, []
    stepper.optimizer.step = lambda: found.extend(p.grad.clone() for p in stepper.model.parameters())
    batches = trainer.data.batches(State(), 1)
    for last in (False, True):
        stepper.accumulate(stepper.prepare(next(batches)[0]), last)
    return stepper.update(0.0)()[0].loss, found


def test_training_follows_the_weights_and_tells_the_plain_loss(data, tmp_path):
    plain, of_plain = gradients(data, tmp_path / "a", "")
    told, of_two = gradients(data, tmp_path / "b", ",".join(f"{f.name}=2" for f in PREDICTED))
    assert told == pytest.approx(plain, rel=1e-6)
    for one, two in zip(of_plain, of_two):  # the mean over targets: to weigh all alike changes nothing
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    told, only = gradients(
        data, tmp_path / "c", ",".join(f"{f.name}=0" for f in PREDICTED if f is not vocab.P)
    )
    assert told == pytest.approx(plain, rel=1e-6)
    assert not torch.allclose(only[0], of_plain[0])
