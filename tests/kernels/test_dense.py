"""The dense baseline: a causal Transformer without summaries, from its attention to its training."""

import dataclasses
import json
from contextlib import nullcontext
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from meloformer import cli, train
from meloformer.data.pairs import Counts
from meloformer.errors import UserError
from meloformer.generate import main as generate_command
from meloformer.generation.load import load_model
from meloformer.kernels import dense, dense_choice
from meloformer.kernels.dense import CausalAttention
from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import SIZES, MeloFormer
from meloformer.tokens import vocab
from meloformer.tokens.vocab import IGNORE_INDEX
from meloformer.training import stepper
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


@pytest.mark.parametrize("rows", [1, 2])
def test_cudnn_is_asked_for_each_document_alone(rows, monkeypatch):
    """With a stand-in for the choice of the backend: every document of the float64 reference, by itself."""
    packed = structure([[song(Random(1), 2), song(Random(2), 3)], [song(Random(3), 4)]][:rows])
    asked, attended = [], []
    attend = dense.scaled_dot_product_attention

    def note(q, k, v, is_causal):
        attended.append(q.shape[2])
        return attend(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(
        dense,
        "sdpa_kernel",
        lambda *backends, set_priority: asked.append((backends, set_priority)) or nullcontext(),
    )
    monkeypatch.setattr(dense, "scaled_dot_product_attention", note)
    tensors, mask = inputs(packed, torch.float64), causal_mask(packed)
    attention = CausalAttention(packed, way="cudnn")
    got = outputs_and_gradients(attention, tensors)
    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # which takes a document of one token
    assert asked == [((first,), True)]
    assert attended == attention.lengths and sum(attended) == packed.doc.numel()
    expected = outputs_and_gradients(lambda *qkv: plain_attention(*qkv, mask), tensors)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_heads_are_joined_without_a_copy():
    packed = structure([[song(Random(1), 2), song(Random(2), 3)]])
    out = CausalAttention(packed)(*inputs(packed, torch.float32)[:3])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", ["flash", "cudnn"])
@pytest.mark.parametrize("name", CASES)
def test_attention_on_a_gpu(name, way):
    packed = structure(CASES[name](Random(name)))
    mask = causal_mask(packed).cuda()
    tensors = [x.cuda() for x in inputs(packed, torch.bfloat16, dim=64)]
    attention = CausalAttention(packed, "cuda", way)
    check_low_precision(attention, lambda *qkv: plain_attention(*qkv, mask), tensors, ("o", "dq", "dk", "dv"))


class TestChoice:
    """Which way is taken on a GPU."""

    def test_the_fewest_milliseconds_count(self):
        assert dense_choice.choose({"flash": 3.0, "fa3": "ImportError: none", "cudnn": 2.0}) == "cudnn"
        assert dense_choice.choose({"flash": 2.0, "cudnn": 2.0}) == "flash"
        assert dense_choice.choose({"flash": "no", "cudnn": "no"}) is None

    def test_nothing_is_measured_where_nothing_is_to_choose(self):
        packed = structure([[song(Random(1), 2)]])
        for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
            question = packed, 2, 32, dtype, torch.device(device), 2
            assert dense_choice.fastest_way(*question) == (None, {})

    def test_nothing_is_measured_where_runs_must_be_equal(self, monkeypatch):
        packed = structure([[song(Random(1), 2)]])
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        question = packed, 2, 32, torch.bfloat16, torch.device("cuda"), 2
        assert dense_choice.fastest_way(*question) == ("flash", {})

    def test_a_run_measures_once_and_says_what_it_takes(self, data, tmp_path, monkeypatch, capsys):
        """With a stand-in for what is measured, and what PyTorch has on a CPU in the place of cuDNN."""
        asked = []

        def fastest(packed, heads, head_dim, dtype, device, layers):
            asked.append((heads, head_dim, dtype, device.type, layers))
            return "cudnn", {"flash": 3.25, "fa3": "ImportError: no FA3", "cudnn": 2.0}

        taken = set()
        attend = CausalAttention.__call__
        monkeypatch.setattr(stepper, "fastest_way", fastest)
        monkeypatch.setattr(dense, "sdpa_kernel", lambda *_, **__: nullcontext())
        monkeypatch.setattr(
            CausalAttention, "__call__", lambda self, *qkv: taken.add(self._way) or attend(self, *qkv)
        )
        train.train(config(data, tmp_path, attention="dense", max_steps=3, save_every=3), TINY)
        assert asked == [(TINY.heads, TINY.head_dim, torch.float32, "cpu", TINY.layers)] and taken == {
            "cudnn"
        }
        said = "dense attention by 'cudnn', the fastest for these documents"
        assert f"{said} (flash: 3.2 ms; fa3: ImportError: no FA3; cudnn: 2.0 ms)" in capsys.readouterr().out
        assert json.loads((tmp_path / "summary.json").read_text())["dense_way"] == "cudnn"

    def test_what_cannot_run_is_named_and_the_rest_is_measured(self):
        """On this CPU, whose flash attention takes what cuDNN does not."""
        packed = structure([[song(Random(1), 2), song(Random(2), 3)]])
        question = packed, 2, 32, torch.float32, torch.device("cpu"), 1, lambda: None
        found = dense_choice.measured(*question)
        assert list(found) == [*dense_choice.MEASURED]
        assert isinstance(found["flash"], str) and isinstance(found["fa3"], str)
        assert dense_choice.choose(found) == "cudnn" and found["cudnn"] > 0

    def test_every_trial_attends_to_documents_of_new_lengths_in_all_layers(self, monkeypatch):
        """The first trial, in which everything is prepared, does not count."""
        packed = structure(
            [[song(Random(1), 2), song(Random(2), 3), song(Random(3), 3)], [song(Random(4), 9)]]
        )
        clock, seen, layers = iter([0, 100, 200, 203, 300, 301, 400, 402]), [], 3
        monkeypatch.setattr(dense_choice.time, "perf_counter", lambda: next(clock))

        def make(trial):
            attention = CausalAttention(dense_choice.lengthened(packed, trial))

            def attend(*qkv):
                seen.append(attention.lengths)
                return attention(*qkv)

            return attend

        waits = []
        tensors = inputs(packed, torch.float32)
        ms = dense_choice.milliseconds_of_a_step(make, tensors, layers, lambda: waits.append(len(seen)))
        assert ms == 2000
        assert waits == [0, 3, 3, 6, 6, 9, 9, 12] and len(seen) == 12
        trials = seen[::layers]
        assert all(seen[i] == trials[i // layers] for i in range(12))
        assert all(sum(lengths) == packed.doc.numel() for lengths in trials)
        for document in range(3):  # of the first row
            assert len({lengths[document] for lengths in trials}) == len(trials)

    def test_what_runs_anywhere_is_taken_if_nothing_else_can(self, monkeypatch):
        failed = dict.fromkeys(dense_choice.MEASURED, "RuntimeError: this GPU is too old")
        monkeypatch.setattr(dense_choice, "measured", lambda *_: failed)
        question = structure([[song(Random(1), 2)]]), 2, 32, torch.bfloat16, torch.device("cuda"), 2
        assert dense_choice.fastest_way(*question) == ("each", failed)

    def test_new_lengths_are_where_the_structure_is(self):
        """Which is on the GPU when a resumed run begins with the validation that it was killed in."""
        packed = structure([[song(Random(1), 2), song(Random(2), 3)]])
        with torch.device("meta"):  # where tensors are made that do not follow another one
            assert dense_choice.lengthened(packed, 1).doc.device == packed.doc.device

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_a_gpu(self):
        packed = structure([[song(Random(1), 20), song(Random(2), 30)]])
        question = packed, 8, 64, torch.bfloat16, torch.device("cuda:0"), 4
        way, found = dense_choice.fastest_way(*question)
        assert way in dense_choice.MEASURED and found[way] > 0
        assert isinstance(found["flash"], float)


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
