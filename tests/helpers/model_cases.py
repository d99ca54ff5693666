"""Tiny models for tests, and which of their inputs influence an output."""

from dataclasses import replace

import torch

from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab

from helpers.attention_cases import NEAR_BARS_OF, ORIGINAL

TINY = ModelConfig(layers=2, dim=32, heads=2, ffn=48, **ORIGINAL)


def of_rule(kind_rule: str) -> ModelConfig:
    """TINY with the rule of `attention_cases.structure(..., kind_rule=kind_rule)`."""
    return replace(TINY, near_bars=NEAR_BARS_OF[kind_rule], kind_rule=kind_rule)


def tiny_model(config: ModelConfig = TINY, dtype=torch.float64) -> MeloFormer:
    """A model with weights large enough that every connection changes the output measurably."""
    torch.manual_seed(0)
    model = MeloFormer(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_ids(batch, length=None, seed=0):
    """Ids [B, length] of no grammar, but that a CHORD begins each bar, and stands nowhere else."""
    length = max(sum(map(len, row)) for row in batch) if length is None else length
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab.VOCAB_SIZE, (len(batch), length), generator=generator)
    is_chord = (ids >= vocab.CHORD.start) & (ids < vocab.CHORD.stop)
    ids = torch.where(is_chord, ids - vocab.CHORD.start + vocab.BPM.start, ids)
    chords = torch.randint(vocab.CHORD.start, vocab.CHORD.start + 6, ids.shape, generator=generator)
    for row, songs in enumerate(batch):
        bars = [(number, token.bar) for number, song in enumerate(songs) for token in song]
        begins = [i for i, bar in enumerate(bars) if i == 0 or bar != bars[i - 1]]
        ids[row, begins] = chords[row, begins]
    return ids


def influence(model, ids, structure, attention, row, token) -> torch.Tensor:
    """Largest gradient of a random mix of the logits of one token by each token embedding: [B, N]."""
    probe = torch.zeros(
        *ids.shape, model.config.dim, dtype=model.token_embedding.weight.dtype, device=ids.device
    )
    probe.requires_grad_()
    handle = model.token_embedding.register_forward_hook(lambda module, args, output: output + probe)
    logits = model(ids, structure, attention)[row, token]
    handle.remove()
    (gradient,) = torch.autograd.grad(logits @ torch.randn_like(logits), probe)
    return gradient.abs().amax(dim=-1)
