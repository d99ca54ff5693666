"""What MFU is made of: against a count by hand, against PyTorch's counter, and in a run's log."""

import json
from random import Random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meloformer import train
from meloformer.data.batches import PackedSongs, State
from meloformer.data.pairs import Counts
from meloformer.data.shards import ShardSet
from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.training import metrics, trainer
from meloformer.training.flops import peak_flops, training_flops

from helpers.attention_cases import ORIGINAL, count_pairs, song, structure
from helpers.tiny_train import TINY
from helpers.training import config


class _NoAttention:
    """Passes gradients on to every input, without a matrix product."""

    any_summaries = False

    def summarize(self, q, *others):
        return q + sum(x.mean(dim=2, keepdim=True) for x in others)

    update = summarize


def test_flops_are_those_written_out_by_hand():
    model = ModelConfig(layers=2, dim=4, heads=1, ffn=3, vocab_size=64)
    counts = Counts(tokens=10, summaries=2, summary_pairs=13, token_pairs=40, causal_pairs=55)
    # QKV, output and SwiGLU of two layers; the head, and the gates of six guesses.
    of_a_token = 2 * (3 * 16 + 16 + 3 * 12) + 4 * (64 + 6)
    of_a_summary = (3 * 16 + 2 * 16 + 16 + 3 * 12) + (3 * 16 + 2 * 16)  # the last layer's is not updated
    of_pairs = 2 * (13 + 40) * 2 * 4  # layers, pairs, products, channels
    forward = 2 * (10 * of_a_token + 2 * of_a_summary + of_pairs)
    assert training_flops(model, counts) == 3 * forward


def test_products_with_weights_are_those_that_pytorch_counts():
    model = MeloFormer(ModelConfig(layers=3, dim=64, heads=2, ffn=80, **ORIGINAL))
    packed = structure([[song(Random(0), 5)]])
    ids = torch.zeros(packed.doc.shape, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        nats, _ = next_token_loss(model(ids, packed, _NoAttention()), ids)
        nats.backward()
    counts = count_pairs(packed)
    without_pairs = Counts(counts.tokens, counts.summaries, 0, 0, 0)
    assert training_flops(model.config, without_pairs) == counter.get_total_flops()


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Warp Drive 9", None),
    ],
)
def test_the_peak_follows_the_name_of_the_gpu(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == (tera and tera * 1e12)
    assert peak_flops(torch.device("cpu")) is None


def test_a_run_logs_tokens_time_and_operations_that_add_up(data, tmp_path, monkeypatch):
    """By a clock that stands still but for a second per look, and with a known peak."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(trainer, "peak_flops", lambda device: 1e9)
    settings = config(data, tmp_path, epochs=1, max_steps=2)
    train.train(settings, TINY)
    packed = PackedSongs(ShardSet(data), "train", max_seq_len=512, max_bars=settings.max_bars)
    batches = [batch for batch, _ in packed.batches(State(), 1, stop_epoch=1)]
    for step in range(2):
        record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[step])
        mine = batches[2 * step : 2 * step + 2]
        real = [batch.structure.doc >= 0 for batch in mine]
        assert all(not row.all() for row in real)  # padding, which must not count
        assert record["tokens"] == sum(int(row.sum()) for row in real)
        # Looks at the clock: before and after each batch, of which the first step asks for the next one too,
        # and at the step's end.
        waits = 2 if step else 3
        seconds = 2 * waits + 1
        assert record["tokens_per_s"] == record["tokens"] / seconds
        assert record["data_wait"] == waits / seconds
        flops = sum(training_flops(TINY, count_pairs(batch.structure)) for batch in mine)
        assert record["mfu"] == pytest.approx(flops / seconds / 1e9)


def test_a_gpu_of_unknown_peak_is_told_once_and_has_no_mfu(data, tmp_path, monkeypatch, capsys):
    class OnCuda:
        type = "cuda"

    run = trainer.Trainer(config(data, tmp_path), TINY, trainer.Job(0, 1, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Warp Drive 9")
    object.__setattr__(run.job, "device", OnCuda())
    trainer.describe(run.stepper, run.job, run.data, run.val_data, run.step, None)
    assert "no MFU: the peak speed of Warp Drive 9 is not known" in capsys.readouterr().out
