"""One optimizer step: the same whatever deals out its rows."""

import dataclasses
import gc
import weakref

import pytest
import torch

from meloformer.data.batches import State
from meloformer.model import transformer
from meloformer.model.instrument_mask import forbidden_instruments
from meloformer.tokens import vocab
from meloformer.training.distributed import start_job
from meloformer.training.stepper import Stepper
from meloformer.training.trainer import Trainer

from helpers.tiny_train import TINY
from helpers.training import arguments, config, forked, read_gradients


@pytest.mark.slow
def test_gradients_do_not_depend_on_how_rows_are_dealt_out(data, tmp_path):
    """Rows differ in targets: a mean of means, or of processes, would be another gradient."""
    shapes = ("1x1x4", "1x4x1", "2x2x1", "2x1x2", "4x1x1")  # processes x batches x rows
    args = arguments(data, max_grad_norm=1e9, max_seq_len=1024)
    forked("gradients", tmp_path, " ".join(shapes), *args)
    found = {}
    for shape in shapes:
        found[shape], exchanged = read_gradients(tmp_path / f"{shape}.safetensors")
        # Each bucket of gradients once a step, however many batches the step has.
        assert len(exchanged) == len(set(exchanged)) and bool(exchanged) == (shape[0] != "1")
    for name, gradient in found[shapes[0]].items():
        for shape in shapes[1:]:
            difference = (found[shape][name] - gradient).abs().max()
            assert difference <= 1e-5 * gradient.abs().max(), (shape, name)


def test_rows_differ_enough_for_the_test_above(data, tmp_path):
    trainer = Trainer(config(data, tmp_path, max_seq_len=1024), TINY, start_job("cpu"))
    targets = [trainer.data.batch(0, [row]).num_targets for row in range(4)]
    assert max(targets) > 1.05 * min(targets), targets


def test_flags_of_any_process_and_sums_come_back(data, tmp_path):
    trainer = Trainer(config(data, tmp_path), TINY, start_job("cpu"))
    batch = trainer.data.batch(0, [0, 1])
    trainer.stepper.accumulate(trainer.stepper.prepare(batch), last=True)
    figures, flags = trainer.stepper.update(1e-3, False, True)()
    assert flags == [False, True]
    assert (figures.tokens, figures.taken, figures.spike) == (batch.tokens, True, None)
    assert 6 < figures.loss < 9  # of a model that knows nothing: the logarithm of the vocabulary


@pytest.mark.parametrize("dense", [False, True])
def test_what_no_weight_changes_is_read_when_a_batch_is_prepared(data, tmp_path, dense, monkeypatch):
    """On a GPU that is beside the batch before. The logits are those of a model that reads it itself."""
    attention = {"attention": "dense"} if dense else {}
    trainer = Trainer(
        config(data, tmp_path, **attention), TINY.as_dense() if dense else TINY, start_job("cpu")
    )
    batch, stepper = trainer.data.batch(0, [0, 1]), trainer.stepper
    model = stepper.model.eval()
    logits = model(batch.ids, batch.structure)
    forbidden = forbidden_instruments(batch.ids, batch.structure)
    logits[..., vocab.INST.start : vocab.INST.stop].masked_fill_(forbidden, -torch.inf)
    assert torch.equal(stepper.logits(batch), logits)
    ready = stepper.prepare(batch)

    def read_again(*_):
        raise AssertionError("the context of a prepared batch is read again")

    monkeypatch.setattr(transformer, "read_context", read_again)
    monkeypatch.setattr("meloformer.training.stepper.forbidden_instruments", read_again)
    stepper.accumulate(ready, last=True)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_stepper_goes_when_nobody_holds_it(data, tmp_path):
    """At once: what it holds must go before the process group, and weights before those of the next."""
    stepper = Stepper(config(data, tmp_path), TINY, start_job("cpu"))
    gone = weakref.ref(stepper), weakref.ref(stepper.model)
    gc.disable()
    try:
        del stepper
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("share", [0.1, 10.0], ids=["clipped", "not clipped"])
def test_gradients_are_means_over_targets_and_clipped_as_pytorch_does(data, tmp_path, share, monkeypatch):
    """Adam does not see by what its gradients are scaled: those that it is given are looked at."""
    trainer = Trainer(config(data, tmp_path, family_weights=""), TINY, start_job("cpu"))
    batch, stepper = trainer.data.batch(0, [0, 1]), trainer.stepper
    stepper.accumulate(stepper.prepare(batch), last=True)
    expected = [torch.nn.Parameter(torch.zeros_like(p)) for p in stepper.model.parameters()]
    for own, parameter in zip(expected, stepper.model.parameters()):
        own.grad = parameter.grad / batch.num_targets
    norm = torch.nn.utils.get_total_norm([own.grad for own in expected]).item()
    limit = share * norm
    torch.nn.utils.clip_grad_norm_(expected, limit)
    monkeypatch.setattr(stepper, "_config", dataclasses.replace(stepper._config, max_grad_norm=limit))
    seen = []
    monkeypatch.setattr(
        stepper.optimizer, "step", lambda: seen.extend(p.grad.clone() for p in stepper.model.parameters())
    )
    figures, _ = stepper.update(1e-3)()
    assert figures.grad_norm == pytest.approx(norm, rel=1e-5)
    for got, own in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, own.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("step", [0, 5])
def test_random_numbers_of_a_step_follow_from_seed_and_step(data, tmp_path, step):
    stepper = Stepper(config(data, tmp_path), TINY, start_job("cpu"))
    stepper.seed(step)
    first = torch.rand(3)
    stepper.seed(step + 1)
    assert not torch.equal(torch.rand(3), first)
    stepper.seed(step)
    assert torch.equal(torch.rand(3), first)


def test_the_state_says_which_rows_come_next(data, tmp_path):
    trainer = Trainer(config(data, tmp_path), TINY, start_job("cpu"))
    assert trainer.epoch == 0
    trainer.step, trainer.state = 6, State(1, 0)
    assert trainer.epoch == 0
    trainer.step, trainer.state = 7, State(1, 2)
    assert trainer.epoch == 1


def test_weights_change_what_is_learned_and_not_what_is_told(data, tmp_path):
    """Against the mean of weight x nats over two batches at once, by PyTorch's own loss."""
    trainer = Trainer(config(data, tmp_path, family_weights="CHORD=0.5,P=3"), TINY, start_job("cpu"))
    stepper, batches = trainer.stepper, [trainer.data.batch(0, [row]) for row in (0, 1)]
    nats, weights = [], []
    for batch in batches:
        counts = batch.targets >= 0
        logits = stepper.logits(batch)[counts]
        nats.append(torch.nn.functional.cross_entropy(logits, batch.targets[counts], reduction="none"))
        weights.append(torch.ones(len(nats[-1])))
        for family, weight in ((vocab.P, 3.0), (vocab.CHORD, 0.5)):
            weights[-1][torch.from_numpy(family.mask(batch.targets[counts].numpy()))] = weight
    nats, weights = torch.cat(nats), torch.cat(weights)
    assert {0.5, 1.0, 3.0} == set(weights.tolist())
    parameters = list(stepper.model.parameters())
    expected = torch.autograd.grad((nats * weights).sum() / weights.sum(), parameters)
    for batch in batches:
        stepper.accumulate(stepper.prepare(batch), last=batch is batches[-1])
    scale = 1 / weights.sum()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad * scale, gradient, rtol=1e-4, atol=1e-7)
    figures, _ = stepper.update(1e-3)()
    norm = torch.nn.utils.get_total_norm(expected).item()
    assert figures.grad_norm == pytest.approx(norm, rel=1e-4)
    assert figures.loss == pytest.approx(nats.mean().item(), rel=1e-5)
