"""The fused kernels of a decoding step against the same step in plain PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from meloformer.composer.compose import compose
from meloformer.generation.device.forward import PlainForward
from meloformer.generation.device.fused import FusedForward, has_kernels
from meloformer.generation.device.step import Step
from meloformer.generation.draft import Draft
from meloformer.kernels import decode
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.model_cases import tiny_model

CONFIG = ModelConfig(layers=2, dim=64, heads=2, ffn=88)  # no width is a multiple of a tile
ROOM, BARS = 200, 16
FP8 = torch.float8_e4m3fn


def song(seed: int, tokens: int) -> np.ndarray:
    return HIDTokenizer().encode(compose(seed, bars=6))[:tokens].astype(np.int64)


def begin(step: Step, slot: int, ids: np.ndarray, prompt: int) -> None:
    draft = Draft(ids[:prompt], max_tokens=len(ids) - prompt)
    step.begin(slot, draft.state(), ids[:prompt], queue=ids[prompt:].tolist())


class Both:
    """The fused forward, and beside it the plain one on a copy of the cache."""

    def __init__(self, model: MeloFormer, cache, reader):
        self.fused, self.plain = FusedForward(model, cache, reader), PlainForward(model, cache, reader)
        self.cache, self.reader, self.compared, self.lists = cache, reader, 0, 0

    def begin(self, slot: int) -> None:
        self.fused.begin(slot)

    def __call__(self, facts, reads, summarizes, bar):
        before = self.cache.keys.clone()
        want = self.plain(facts, reads, summarizes, bar)
        keys = self.cache.keys.clone()
        self.cache.keys.copy_(before)
        got = self.fused(facts, reads, summarizes, bar)
        visible = self.plain._sight.places(facts, reads, summarizes, bar)
        rows = self.fused.rows
        for slot in torch.nonzero(reads | summarizes)[:, 0].tolist():
            listed = rows.list[slot, : rows.count[slot]].sort().values
            assert torch.equal(listed.long(), torch.nonzero(visible[slot])[:, 0])
            self.lists += 1
        assert not rows.count[~(reads | summarizes)].any()
        found, wanted = self.cache.keys[:, :, :, :-1].float(), keys[:, :, :, :-1].float()
        if keys.dtype is FP8:
            self.compare_rounded(found, wanted, got[reads], want[reads])
        else:
            torch.testing.assert_close(got[reads], want[reads], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        self.compared += int(reads.sum())
        return want

    def compare_rounded(self, found, wanted, got, want) -> None:
        """Keys of 8 bits: a number that lies between two may be rounded to either."""
        if found.is_cuda:
            other = found != wanted
            assert other.sum() <= 1e-3 * wanted.count_nonzero()
            torch.testing.assert_close(found, wanted, rtol=1 / 8, atol=2**-9)
            # An eighth of a few of the keys that a token sees.
            torch.testing.assert_close(got, want, rtol=1e-4, atol=0.05 if other.any() else 1e-4)
            return
        # Triton's interpreter rounds numbers just below a power of two to half of it. So what attention finds
        # differs, and all behind it: only what the first layer writes before it can be compared.
        before = self.cache.room + self.cache.bars
        found, wanted = found[0, :, :, :before], wanted[0, :, :, :before]
        rounds_up = wanted.abs().frexp().mantissa == 0.5
        expected = torch.where(rounds_up & (found != wanted), wanted / 2, wanted)
        assert (found != expected).sum() <= 1e-3 * wanted.count_nonzero()


@pytest.mark.parametrize(
    ("config", "slots", "cache_dtype"),
    [
        (CONFIG, 1, None),
        (CONFIG, 3, None),
        (CONFIG, 17, None),
        (CONFIG.as_dense(), 3, None),
        (replace(CONFIG, layers=1), 3, FP8),
    ],
    ids=["1", "3", "17", "dense", "8 bits"],
)
def test_logits_keys_and_lists_are_those_of_the_plain_forward(config, slots, cache_dtype, monkeypatch):
    """Songs of different lengths, whose bars end; some slots are empty, one is taken over by another song."""
    # Fewer and larger programs, since the interpreter is slow.
    monkeypatch.setattr(decode, "_HEAD_COLUMNS", 512)
    monkeypatch.setattr(decode, "_ROW_HEAD_COLUMNS", 512)
    monkeypatch.setattr(decode, "_PROGRAMS", 8)
    for name in ("_ROW_PAIRS", "_ROW_COLUMNS", "_ROW_DOWN_COLUMNS"):
        monkeypatch.setattr(decode, name, 8)
    monkeypatch.setattr(decode, "_MAX_ROWS", 16)  # two tiles for 17 songs, as for 64
    if slots > 1:
        for name in ("_PAIRS", "_COLUMNS", "_DOWN_COLUMNS"):
            monkeypatch.setattr(decode, name, 32)
    model = tiny_model(config, torch.float32)
    for parameter in model.parameters():
        parameter.data /= 2  # softmax over keys that differ too much would hide most of them
    step = Step(model, slots, ROOM, BARS, queue=ROOM, forward=Both, cache_dtype=cache_dtype)
    songs = [(song(7, 66), 59), (song(1, 160), 146), (song(6, 130), 122)]
    for number, one in enumerate(songs[:slots]):
        begin(step, (number * 7) % slots, *one)
    for number in range(9):
        step()
        if number == 4:
            begin(step, 0, song(7, 40), 32)
    summaries = step._forward.lists - step._forward.compared
    assert step._forward.compared > 5 and summaries == (0 if config.dense else min(slots, 3) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=["", "8 bits"])
@pytest.mark.parametrize("slots", [1, 5, 64])
def test_compiled_kernels_compute_what_the_plain_forward_does(slots, cache_dtype):
    """In the shape of the base model; float32."""
    shape = ModelConfig(layers=3, dim=512, heads=8, ffn=2752)
    torch.manual_seed(0)
    model = MeloFormer(shape).to("cuda").eval()
    step = Step(model, slots, ROOM, BARS, queue=ROOM, forward=Both, cache_dtype=cache_dtype)
    for slot in range(slots):
        begin(step, slot, *[(song(7, 80), 59), (song(1, 170), 146), (song(6, 140), 122)][slot % 3])
    for number in range(12):
        step()
        if number == 4:
            begin(step, 0, song(7, 40), 32)
    assert step._forward.lists > step._forward.compared >= 7 * slots


def errors(shape: ModelConfig, device: str, dtype: torch.dtype, slots: int, steps: int) -> dict[str, float]:
    """Of the logits of a new song against float64 (on the CPU), by forward: "plain" and "fused"."""
    torch.manual_seed(0)
    weights = MeloFormer(shape).state_dict()
    found = {}
    for name, place, forward, songs in (
        ("exact", ("cpu", torch.float64), PlainForward, 1),
        ("plain", (device, dtype), PlainForward, slots),
        ("fused", (device, dtype), FusedForward, slots),
    ):
        model = MeloFormer(shape)
        model.load_state_dict(weights)
        model, noted = model.to(*place).eval(), []

        class Noting(forward):
            def __call__(self, *arguments, noted=noted):
                logits = super().__call__(*arguments)
                noted.append(logits[0].double().cpu())
                return logits

        step = Step(model, songs, ROOM, BARS, "reference", queue=ROOM, forward=Noting)
        for slot in range(songs):
            begin(step, slot, song(7, 70), 1)
        for _ in range(steps):
            step()
        found[name] = torch.stack(noted)
    return {name: (found[name] - found["exact"]).norm().item() for name in ("plain", "fused")}


def test_half_precision(monkeypatch):
    """float16 here: the interpreter has no products of bfloat16."""
    monkeypatch.setattr(decode, "_ROW_HEAD_COLUMNS", 2048)
    monkeypatch.setattr(decode, "_PROGRAMS", 4)
    for name in ("_ROW_PAIRS", "_ROW_COLUMNS", "_ROW_DOWN_COLUMNS"):
        monkeypatch.setattr(decode, name, 16)
    error = errors(ModelConfig(layers=2, dim=32, heads=1, ffn=40), "cpu", torch.float16, slots=1, steps=10)
    assert 0 < error["fused"] <= 2 * error["plain"], error


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 64])
def test_compiled_kernels_in_half_precision(slots):
    shape = ModelConfig(layers=4, dim=512, heads=8, ffn=2752)
    error = errors(shape, "cuda", torch.bfloat16, slots, steps=60)
    assert 0 < error["fused"] <= 2 * error["plain"], error


def test_models_of_other_rules_have_no_kernels():
    assert has_kernels(CONFIG)
    for other in (
        ModelConfig(layers=1, dim=64, heads=2, ffn=64, kind_rule="next"),
        ModelConfig(layers=1, dim=64, heads=2, ffn=64, near_bars=(0, 40)),
        ModelConfig(layers=1, dim=32, heads=2, ffn=64),
    ):
        assert not has_kernels(other)
        with pytest.raises(ValueError, match="no fused kernels"):
            FusedForward(MeloFormer(other), None, None)
