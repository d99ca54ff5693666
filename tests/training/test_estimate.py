"""The estimate before the first step, against what autograd really saves."""

import dataclasses
import json
import re

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from meloformer import train
from meloformer.errors import UserError
from meloformer.kernels import Structure
from meloformer.model.inputs import ChordGuesses
from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import RECOMPUTE, SIZES, MeloFormer, ModelConfig
from meloformer.training.config import TrainConfig
from meloformer.training.estimate import activation_bytes, estimate_memory, is_out_of_memory, out_of_memory

from helpers.tiny_train import TINY
from helpers.training import ROOT, config

CPU = torch.device("cpu")


class _FlashLike(torch.autograd.Function):
    """Saves what a fused attention saves: its inputs, its output and a number per row and head."""

    @staticmethod
    def forward(ctx, q, *keys_and_values):
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, *keys_and_values, out, torch.zeros(q.shape[:-1]))
        return out


class _Storages(TorchDispatchMode):
    """Notes the memory of all tensors that are made with a dimension of so many tokens."""

    def __init__(self, *tokens):
        super().__init__()
        self._tokens, self._sizes = {*tokens}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and self._tokens & {*tensor.shape}:
                storage = tensor.untyped_storage()
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self):
        return sum(size for storage, size in self._sizes.items() if not storage.expired())


class _FakeAttention:
    any_summaries = False

    def summarize(self, *inputs):
        return _FlashLike.apply(*inputs)

    update = summarize


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim, ffn, layers", [(64, 704, 2), (128, 360, 4)])
def test_activations_are_what_is_alive_after_the_forward(dim, ffn, layers, dtype, recompute):
    config = ModelConfig(layers=layers, dim=dim, heads=dim // 32, ffn=ffn)
    model, tokens = MeloFormer(config, recompute), 4096
    zeros = torch.zeros(1, tokens, dtype=torch.int32)
    structure = Structure.build(*[zeros] * 5, num_summaries=1, near_bars=config.near_bars)
    with _Storages(tokens, tokens + 1) as storages:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(zeros.long(), structure, _FakeAttention())
        next_token_loss(logits, zeros.long())
    estimate = activation_bytes(config, tokens, dtype.itemsize, recompute)
    # What is computed again comes in the backward, for one layer at a time; so does the logits' gradient.
    spared = activation_bytes(config, tokens, dtype.itemsize) - estimate
    estimate -= spared / (layers - 1) + tokens * config.padded_vocab_size * dtype.itemsize
    # The last stream, its norm, the tables of RoPE, the rows of the embeddings and the chord guesses are no
    # part of a layer.
    guesses = len(ChordGuesses._fields)
    guessed = guesses * (8 + guesses)  # an id each, and whose gates are added to it
    rows = 8 * (2 + len(config.features))
    others = tokens * (dtype.itemsize * 2 * (dim + config.head_dim) + rows + guessed)
    assert estimate * 0.98 <= storages.alive() <= estimate * 1.02 + others


def test_states_are_counted_by_the_parameter():
    settings = TrainConfig(data_dir="", batch_size=2, max_seq_len=1024)
    one = estimate_memory(settings, TINY, 1000, 4, world=1)
    assert (one.weights, one.gradients, one.optimizer) == (4000, 4000, 8000)
    assert one.total == 16000 + one.activations
    two = estimate_memory(settings, TINY, 1000, 2, world=2)
    assert (two.weights, two.gradients, two.optimizer) == (6000, 8000, 8000)
    at_once = dataclasses.replace(settings, gradient_accumulation_steps=1)
    assert estimate_memory(at_once, TINY, 1000, 2, world=2).gradients == 4000


def test_sharded_states_are_counted_by_their_share():
    """Besides the weights of two layers of eight and their gradients; or all gradients, to add up batches."""
    model, settings = dataclasses.replace(TINY, layers=8), TrainConfig(data_dir="", shard_state=True)
    four = estimate_memory(settings, model, 1000, 2, world=4)
    assert (four.weights, four.gradients, four.optimizer) == (1000 + 1000 + 2000, 1000 + 1000 + 4000, 2000)
    at_once = dataclasses.replace(settings, gradient_accumulation_steps=1)
    assert estimate_memory(at_once, model, 1000, 2, world=4).gradients == 2000
    plain = dataclasses.replace(settings, shard_state=False)
    one, other = (estimate_memory(each, model, 1000, 2, 1) for each in (settings, plain))
    assert one == other


def test_the_formula_is_near_what_was_measured_on_gpus():
    """In the committed results of the training benchmark."""
    found = []
    for path in (ROOT / "benchmarks" / "results").glob("training_*/*.json"):
        for row in json.loads(path.read_text())["rows"]:
            model = SIZES[row["size"]]
            model = model.as_dense() if row["attention"] == "dense" else model
            settings = TrainConfig(
                data_dir="",
                batch_size=row["rows_per_batch"],
                gradient_accumulation_steps=1,
                max_seq_len=row["tokens_per_row"],
                checkpoint_activations=row["checkpoint_activations"],
            )
            memory = estimate_memory(settings, model, row["parameters"], 2, row["gpus"])
            found.append(memory.total / 1e9 / row["peak_gb"])
    assert found and 0.75 < min(found) and max(found) < 1.25, found


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"batch_size": 4},
            r"lower --batch_size \(now 4\) and raise --gradient_accumulation_steps \(now 8\)",
        ),
        ({"batch_size": 1}, r"try --checkpoint_activations layer, or lower"),
        (
            {"batch_size": 1, "checkpoint_activations": "layer"},
            r"lower --max_seq_len \(now 24576\) or take a smaller --model_size",
        ),
        ({"batch_size": 1, "precision": "fp32"}, r"try --precision bf16, or try --checkpoint"),
    ],
    ids=str,
)
def test_the_error_names_the_flag_to_turn(changes, says):
    assert re.search(says, str(out_of_memory(TrainConfig(data_dir="", **changes), CPU)))


def test_the_error_names_sharding_if_others_could_share():
    settings = TrainConfig(data_dir="", batch_size=1, checkpoint_activations="layer")
    assert "try --shard_state, or lower --max_seq_len" in str(out_of_memory(settings, CPU, world=2))
    for world, sharded in ((1, False), (2, True)):
        settings = dataclasses.replace(settings, shard_state=sharded)
        assert "--shard_state" not in str(out_of_memory(settings, CPU, world))


def test_what_counts_as_a_lack_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_dry_run_tells_and_leaves_nothing(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.train(config(data, run, dry_run=True), TINY) is None
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["model", "data", "steps", "memory", "disk", "time"]
    assert lines["data"].startswith("12 rows of 512 tokens per epoch")
    assert lines["steps"] == "6 of 2 rows per epoch, 12 in all"
    assert re.match(r"\d+\.\d\d s per step, measured on one; \d+\.\d minutes per epoch", lines["time"])
    assert not run.exists()


def test_a_dry_run_tells_of_weights_that_it_could_not_begin_with(data, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train.train(config(data, tmp_path, dry_run=True, init_from=str(tmp_path / "nowhere")), TINY)


def test_a_dry_run_does_not_try_what_a_cpu_cannot_do(data, tmp_path, capsys):
    train.train(
        config(data, tmp_path, dry_run=True, max_seq_len=24576, batch_size=4), ModelConfig(6, 256, 4, 2752)
    )
    assert "not measured" in capsys.readouterr().out
