"""Keys and values of 8 bits: what they hold, how little they change, and where they cannot be asked for."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.generation.decoder import Recording, padded_batch
from meloformer.generation.device import loop
from meloformer.generation.device.cache import SlotCache, bytes_of_a_slot
from meloformer.generation.device.forward import PlainForward
from meloformer.generation.device.step import Step
from meloformer.generation.draft import Draft
from meloformer.generation.generator import Generator
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer

CONFIG = ModelConfig(layers=2, dim=64, heads=2, ffn=128)
FP8 = torch.float8_e4m3fn
PROMPT, TOKENS = 200, 250


def song(seed: int) -> np.ndarray:
    return HIDTokenizer().encode(compose(seed, bars=6))[:TOKENS].astype(np.int64)


@pytest.fixture(scope="module")
def trained():
    """A model that has learned something: attention of a random one is so even that rounding averages out."""
    torch.manual_seed(0)
    model = MeloFormer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        ids = song(10 + step % 2)
        logits = model(*padded_batch(model, ids))[0, : len(ids) - 1, : vocab.VOCAB_SIZE]
        loss = F.cross_entropy(logits, torch.from_numpy(ids[1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 4  # nats; 6.9 at random
    return model.eval()


def log_probabilities(model: MeloFormer, cache_dtype: torch.dtype | None) -> torch.Tensor:
    """[n, VOCAB_SIZE] of what follows the tokens of two songs behind their prompts, by the plain step."""
    noted = []

    class Noting(PlainForward):
        def __call__(self, facts, reads, *more):
            logits = super().__call__(facts, reads, *more)
            noted.append(logits[reads])
            return logits

    step = Step(model, 2, 256, 16, queue=TOKENS, forward=Noting, cache_dtype=cache_dtype)
    for slot in range(2):
        ids = song(10 + slot)
        state = Draft(ids[:PROMPT], max_tokens=TOKENS - PROMPT).state()
        step.begin(slot, state, ids[:PROMPT], queue=ids[PROMPT:].tolist())
    while step.draft.active.any():
        step()
    return torch.cat(noted).log_softmax(-1)


def test_logits_change_little(trained):
    exact, rounded = (log_probabilities(trained, dtype) for dtype in (None, FP8))
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    assert len(divergence) >= 2 * (TOKENS - PROMPT - 1)
    assert 1e-6 < divergence.mean() < 3e-3  # nats, of some 3 of entropy; 0 if nothing was rounded


def test_what_is_beyond_8_bits_is_the_largest_number():
    cache = SlotCache(CONFIG, 2, 8, 4, FP8, torch.device("cpu"))
    numbers = torch.tensor([1e4, -1e4, 448, 0.3])
    written = numbers.repeat(2, 2, 2, 16)[..., :32]  # [S, 2, H, D]
    cache.write(1, torch.tensor([3, 5]), written)
    want = torch.tensor([448, -448, 448, 0.3125]).repeat(8)
    for slot, place in enumerate((3, 5)):
        assert (cache.keys[1, :, slot, place].float() == want).all()
    assert cache.keys[1].float().count_nonzero() == written.numel()

    recording = Recording(lambda q, k, v: q, cache, [0], 2, 0)
    k = numbers.repeat(1, 2, 8, 8)  # [B, H, N, D]
    recording(k, k, k)
    assert (cache.tokens[0, :, 0, :, :2].float() == want).all()


def test_a_slot_takes_half_the_memory_of_bfloat16():
    assert 2 * bytes_of_a_slot(CONFIG, 256, 16, FP8) == bytes_of_a_slot(CONFIG, 256, 16, torch.bfloat16)


def test_a_generator_writes_with_such_caches(trained, monkeypatch):
    monkeypatch.setattr(loop, "require_gpu", lambda device: None)
    monkeypatch.setattr(loop, "has_float8", lambda device: True)
    generator = Generator(trained, 256, graphs=True, cache_dtype="fp8")
    made = []
    monkeypatch.setattr(
        loop, "step_for", lambda model: lambda *a, **k: made.append(Step(*a, **k)) or made[-1]
    )
    monkeypatch.setattr(loop, "Graph", lambda step: partial(loop._repeat, step, loop.BLOCK))
    (written,) = generator.generate(max_tokens=40)
    assert len(written.ids) > 20 and [step.cache.keys.dtype for step in made] == [FP8]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache_dtype": "fp8"}, "--cache_dtype fp8: needs CUDA graphs: a GPU, and no --no-graphs"),
        (
            {"cache_dtype": "fp8", "graphs": True},
            "--cache_dtype fp8: needs an NVIDIA GPU of compute capability",
        ),
        ({"cache_dtype": "int8"}, "--cache_dtype: must be one of model, fp8, got int8"),
    ],
)
def test_where_they_cannot_be_asked_for(trained, monkeypatch, options, says):
    monkeypatch.setattr(loop, "require_gpu", lambda device: None)
    with pytest.raises(UserError, match=says):
        Generator(trained, 256, **options)
