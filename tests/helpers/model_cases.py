"""Tiny models for tests, and which of their inputs influence an output."""

from dataclasses import replace
from itertools import groupby
from random import Random

import torch

from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab

from helpers.attention_cases import NEAR_BARS_OF, ORIGINAL

TINY = ModelConfig(layers=2, dim=32, heads=2, ffn=48, **ORIGINAL)
_ANYWHERE = torch.tensor(
    [i for i in range(vocab.VOCAB_SIZE) if vocab.family_of(i) not in (vocab.BAND, vocab.CHORD, vocab.INST)]
)
_BAND_SIZE, _TOKENS_PER_GROUP = 8, 6


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
    """Ids [B, length] of no grammar, but that a CHORD begins each bar, then in the first bar of a song BAND
    tokens, each another; that the INST of a bar are some of them, in their order; and that these families
    stand nowhere else. So no token is one of `forbidden_instruments`."""
    length = max(sum(map(len, row)) for row in batch) if length is None else length
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    ids = _ANYWHERE[torch.randint(0, len(_ANYWHERE), (len(batch), length), generator=generator)]
    chords = torch.randint(vocab.CHORD.start, vocab.CHORD.start + 6, ids.shape, generator=generator)
    for row, songs in enumerate(batch):
        start = 0
        for song in songs:
            band = None
            for _, bar in groupby(range(len(song)), key=lambda i: song[i].bar):
                first, *rest = (start + i for i in bar)
                ids[row, first] = chords[row, first]
                if band is None:
                    size = min(_BAND_SIZE, len(rest))
                    band = random.sample(range(len(vocab.BAND)), size)
                    ids[row, rest[:size]] = vocab.BAND.start + torch.tensor(band, dtype=torch.int64)
                    rest = rest[size:]
                heads = sorted(random.sample(rest, min(len(band), len(rest) // _TOKENS_PER_GROUP)))
                players = [band[i] for i in sorted(random.sample(range(len(band)), len(heads)))]
                ids[row, heads] = vocab.INST.start + torch.tensor(players, dtype=torch.int64)
            start += len(song)
    return ids


def keep_embeddings(model) -> list[torch.Tensor]:
    """A list that grows by the embeddings of the tokens, [B, N, E], whenever the model runs from now on."""
    embed, kept = model.embed, []

    def keeping(*arguments):
        kept.append(embed(*arguments))
        return kept[-1]

    model.embed = keeping
    return kept


def add_to_embeddings(model, probe: torch.Tensor) -> None:
    embed = model.embed
    model.embed = lambda *arguments: embed(*arguments) + probe


def influence(model, ids, structure, attention, row, token) -> torch.Tensor:
    """Largest gradient of a random mix of the logits of one token by each token embedding: [B, N]."""
    probe = torch.zeros(
        *ids.shape, model.config.dim, dtype=model.token_embedding.weight.dtype, device=ids.device
    )
    probe.requires_grad_()
    add_to_embeddings(model, probe)
    logits = model(ids, structure, attention)[row, token]
    del model.embed  # the method is left
    (gradient,) = torch.autograd.grad(logits @ torch.randn_like(logits), probe)
    return gradient.abs().amax(dim=-1)
