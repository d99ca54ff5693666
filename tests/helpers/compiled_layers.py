"""Small models, batches and attentions for tests of compiled layers."""

from random import Random

import pytest
import torch

from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import ModelConfig

from helpers.attention_cases import ORIGINAL, of_length, structure
from helpers.model_cases import random_ids

# How layers are recomputed; "ffn" does a part of what "layer" does, and is tried where time matters less.
RECOMPUTING = ["none", pytest.param("ffn", marks=pytest.mark.faults), "layer"]
LENGTH, SUMMARIES = 96, 40
SPARSE = ModelConfig(layers=4, dim=32, heads=2, ffn=48, **ORIGINAL)


class StaticAttention:
    """Attention for tensors of one fixed shape, like that of the kernels' operators; the mask is random."""

    any_summaries = False

    def __init__(self, packed):
        generator = torch.Generator().manual_seed(int(packed.doc.sum()))
        self.summaries, self.tokens = packed.summary_doc.shape[1], packed.doc.shape[1]
        self.mask = torch.rand(self.tokens, self.summaries + self.tokens, generator=generator) < 0.3
        self.mask[:, 0] = True

    def summarize(self, q, k_s, v_s, k_r, v_r):
        return self._attend(q, k_s, v_s, k_r, v_r, self.mask[: self.summaries])

    def update(self, q, k_r, v_r, k_s, v_s):
        return self._attend(q, k_s, v_s, k_r, v_r, self.mask)

    def _attend(self, q, k_s, v_s, k_r, v_r, mask):
        k, v = torch.cat([k_s, k_r], dim=2), torch.cat([v_s, v_r], dim=2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class AnySummaries:
    """Attention whose graph works for any number of summaries, like that of the kernels' operators."""

    any_summaries = True

    def summarize(self, q, k_s, v_s, k_r, v_r):
        return q + k_s + v_s + (k_r + v_r).mean(dim=2, keepdim=True)

    def update(self, q, k_r, v_r, k_s, v_s):
        return q + k_r + v_r + (k_s + v_s).mean(dim=2, keepdim=True)


def batches(number, rows=2, summaries=SUMMARIES):
    """Batches of one shape with different documents."""
    for seed in range(number):
        random = Random(seed)
        first = random.randint(3, LENGTH - 10)
        batch = [
            [of_length(random, first), of_length(random, random.randint(1, LENGTH - first))]
            for _ in range(rows)
        ]
        yield structure(batch, LENGTH, summaries), random_ids(batch, LENGTH, seed)


def step(model, packed, ids, attention):
    model.zero_grad()
    nats, count = next_token_loss(model(ids, packed, attention), ids)
    (nats / count).backward()
    return nats.detach(), [parameter.grad for parameter in model.parameters()]
