"""The dense baseline: a causal Transformer without summaries, from its attention to its training."""

import dataclasses
import json
from random import Random

import pytest
import torch
import torch.nn.functional as F

from meloformer import cli, train
from meloformer.data.pairs import Counts
from meloformer.errors import UserError
from meloformer.generate import main as generate_command
from meloformer.generation.load import load_model
from meloformer.kernels.dense import CausalAttention
from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import SIZES, MeloFormer
from meloformer.tokens import vocab
from meloformer.tokens.vocab import IGNORE_INDEX
from meloformer.training.flops import training_flops

from helpers.attention_cases import (
    CASES,
    check_low_precision,
    count_pairs,
    outputs_and_gradients,
    plain_attention,
    song,
    structure,
)
from helpers.generated import generate
from helpers.model_cases import influence, random_ids, tiny_model
from helpers.tiny_train import TINY
from helpers.training import config, losses

DENSE_TINY = TINY.as_dense()


def causal_mask(packed):
    """Who sees whom, bool [B, N, N]; padding attends to padding."""
    index = torch.arange(packed.doc.shape[1])
    return (packed.doc[:, :, None] == packed.doc[:, None]) & (index <= index[:, None])


def inputs(packed, dtype, dim=32):
    generator = torch.Generator().manual_seed(0)
    shape = (packed.doc.shape[0], 2, packed.doc.shape[1], dim)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_attention_is_causal_inside_documents(name):
    packed = structure(CASES[name](Random(name)))
    tensors = inputs(packed, torch.float64)
    mask = causal_mask(packed)
    expected = outputs_and_gradients(lambda *qkv: plain_attention(*qkv, mask), tensors)
    for got, want in zip(outputs_and_gradients(CausalAttention(packed), tensors), expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_attention_of_many_documents_in_one_call(name):
    packed = structure(CASES[name](Random(name)))
    mask = causal_mask(packed).cuda()
    tensors = [x.cuda() for x in inputs(packed, torch.bfloat16, dim=64)]
    attention = CausalAttention(packed, "cuda")
    check_low_precision(attention, lambda *qkv: plain_attention(*qkv, mask), tensors, ("o", "dq", "dk", "dv"))


@pytest.mark.parametrize("size", SIZES)
def test_as_many_parameters_as_with_summaries(size):
    with torch.device("meta"):
        sparse, dense = MeloFormer(SIZES[size]), MeloFormer(SIZES[size].as_dense())
    assert dense.num_parameters() == pytest.approx(sparse.num_parameters(), rel=0.02)
    assert dense.config.ffn % 64 == 0 and dense.config.as_dense() == dense.config
    names = {name.split(".")[2] for name, _ in dense.named_parameters() if name.startswith("layers")}
    assert names == {"norm_r", "qkv_r", "out_r", "norm_ffn", "ffn"}


def test_no_token_sees_what_comes_later_or_other_documents():
    batch = [[song(Random(1), 3), song(Random(2), 2)], [song(Random(3), 4)]]
    packed, ids, model = structure(batch), random_ids(batch), tiny_model(DENSE_TINY)
    mask = causal_mask(packed)
    for row in range(2):
        for token in range(0, int((packed.doc[row] >= 0).sum()), 7):
            reached = influence(model, ids, packed, "dense", row, token) != 0
            assert torch.equal(reached[row], mask[row, token]) and not reached[1 - row].any(), (row, token)


def test_packing_and_padding_change_nothing():
    songs = [song(Random(4), 3), song(Random(5), 2), song(Random(6), 4)]
    batch = [songs[:2], songs[2:]]
    packed, ids, model = structure(batch), random_ids(batch), tiny_model(DENSE_TINY)
    logits = model(ids, packed)
    wide = model(F.pad(ids, (0, 9)), structure(batch, ids.shape[1] + 9))[:, : ids.shape[1]]
    real = packed.doc >= 0
    torch.testing.assert_close(wide[real], logits[real], rtol=0, atol=1e-11)
    for row, documents in enumerate(batch):
        start = 0
        for tokens in documents:
            part = slice(start, start + len(tokens))
            alone = model(ids[row : row + 1, part], structure([[tokens]]))[0]
            torch.testing.assert_close(logits[row, part], alone, rtol=0, atol=1e-11)
            start = part.stop


def test_every_parameter_learns():
    batch = CASES["padding_row"](Random(7))
    packed, ids, model = structure(batch), random_ids(batch), tiny_model(DENSE_TINY, torch.float32)
    nats, _ = next_token_loss(model(ids, packed), ids.where(packed.doc >= 0, IGNORE_INDEX))
    nats.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_flops_are_those_written_out_by_hand():
    model = dataclasses.replace(DENSE_TINY, layers=2, dim=4, heads=1, ffn=3, vocab_size=64)
    counts = Counts(tokens=10, summaries=2, summary_pairs=13, token_pairs=40, causal_pairs=55)
    forward = 2 * 10 * (2 * (4 * 16 + 3 * 12) + 4 * (64 + 6)) + 2 * 55 * 2 * 2 * 4
    assert training_flops(model, counts) == 3 * forward


def test_it_trains_resumes_and_generates(data, tmp_path):
    settings = config(data, tmp_path / "whole", attention="dense", save_every=5)
    train.train(settings, TINY)
    curve = losses(tmp_path / "whole")
    assert curve[-1] < curve[0] - 0.5
    half = dataclasses.replace(settings, output_dir=str(tmp_path / "half"))
    stopped = iter([None] * 5 + ["a test"] * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.StopRequest, "reason", property(lambda self: next(stopped)))
        assert train.train(half, TINY) == "a test"
    assert len(losses(tmp_path / "half")) < len(curve)
    train.train(dataclasses.replace(half, resume="auto"), TINY)
    assert losses(tmp_path / "half") == curve

    saved = next((tmp_path / "whole" / "checkpoints").iterdir()) / "config.json"
    assert '"dense": true' in saved.read_text()
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["attention"] == "dense"
    model, _ = load_model(tmp_path / "whole", torch.device("cpu"))
    written = generate(model, max_tokens=30)
    assert written[0] == vocab.BOS and written[-1] == vocab.EOS

    with pytest.raises(UserError, match=r"cannot resume from .*: model was"):
        train.train(dataclasses.replace(settings, resume="auto", attention="reference"), TINY)


@pytest.mark.parametrize(
    "trained, asked, says", [("dense", "reference", "is dense"), ("reference", "dense", "with summaries")]
)
def test_the_attention_of_another_model_is_refused_in_one_line(
    data, tmp_path, trained, asked, says, capsys, monkeypatch
):
    train.train(config(data, tmp_path / "run", max_steps=1, attention=trained), TINY)
    args = ["--checkpoint", tmp_path / "run", "--output", tmp_path / "song.mid", "--attention", asked]
    monkeypatch.setattr("sys.argv", ["generate", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(generate_command)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: --attention {asked}: ") and says in error


def test_the_loader_counts_what_it_computes():
    packed = structure(CASES["rows"](Random(0)))
    assert count_pairs(packed).causal_pairs == int(
        (causal_mask(packed) & (packed.doc >= 0)[:, :, None]).sum()
    )
