"""The model's part of a step in plain PyTorch, on tensors of fixed shapes.

A slot either reads a token, or computes the summary of the bar that its next token ends: both are one row of
the same products, by weights of their own where streams have such. So a bar costs one step more, and no step
asks whether a bar has ended.

Shape suffixes: S slots, E model width, H heads, D channels of a head, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.rope import apply_rope
from ...model.copying import copies_of
from ...model.inputs import InputFeatures
from ...model.layers import RMSNorm, Rotary
from ...model.transformer import MeloFormer
from ...tokens import vocab
from .cache import Sight, SlotCache
from .reader import Facts, SlotReader


class PlainForward:
    """Called with what each slot reads; writes keys and values to the cache.

    Args:
        model: in eval mode.
        cache: of its keys and values.
        reader: of the tokens.
    """

    def __init__(self, model: MeloFormer, cache: SlotCache, reader: SlotReader):
        self._model, self._cache, self._dense = model, cache, model.config.dense
        self._sight = Sight(cache, reader, model.config)

    def begin(self, slot: int) -> None:
        """Another song is in this slot: of the one before nothing is kept."""

    def __call__(self, facts: Facts, reads: Tensor, summarizes: Tensor, bar: Tensor) -> Tensor:
        """Logits [S, VOCAB_SIZE] of what follows the tokens; they mean nothing for slots that read none.

        Args:
            facts: of the tokens.
            reads, summarizes: bool [S], of no slot both.
            bar: of the token, or the one that is summarized.
        """
        model, cache = self._model, self._cache
        visible = self._sight.places(facts, reads, summarizes, bar)
        features = InputFeatures(*(feature[:, None] for feature in facts.features))
        x_SE = model.embed(model.rows_of(facts.token[:, None], facts.inst[:, None], features))[:, 0]
        place = torch.where(reads, facts.position, cache.nowhere)
        if not self._dense:
            x_SE = torch.where(summarizes[:, None], model.summary_embedding, x_SE)
            place = torch.where(summarizes, cache.room + bar, place)
        past = torch.where(summarizes, cache.room + cache.bars + bar, cache.nowhere)
        # A summary stands at the last token of its bar, and at its end: where the next bar begins.
        rotary = model.rotary_of_tokens(
            facts.position[:, None],
            (bar + summarizes.long())[:, None],
            torch.where(summarizes, 0, facts.features.onset)[:, None],
        )
        for number, layer in enumerate(model.layers):
            q_SHD, kv_S2HD = self._project("qkv", "norm", layer, x_SE, summarizes, rotary)
            cache.write(number, place, kv_S2HD)
            k, v = cache.keys[number].transpose(2, 3).to(q_SHD.dtype)  # [S, H, P, D] each
            o_SHD = F.scaled_dot_product_attention(q_SHD[:, :, None], k, v, attn_mask=visible[:, None, None])
            o_SE = o_SHD.flatten(1)
            added = F.linear(o_SE, layer.out_r.weight)
            if not self._dense:
                kv2_S2HD = self._rotated(F.linear(o_SE, layer.kv2.weight), rotary)
                cache.write(number, past, kv2_S2HD)
                if layer.out_s is not None:
                    added = torch.where(summarizes[:, None], F.linear(o_SE, layer.out_s.weight), added)
            x_SE = x_SE + added
            gate, up = F.linear(_norm(layer.norm_ffn, x_SE), layer.ffn.gate_up.weight).chunk(2, dim=-1)
            x_SE = x_SE + F.linear(F.silu(gate) * up, layer.ffn.down.weight)
        copies = copies_of([guess[:, None] for guess in facts.guesses])
        return model.logits(x_SE[:, None], copies)[:, 0, : vocab.VOCAB_SIZE]

    def _project(
        self, weight: str, norm: str, layer: nn.Module, x_SE: Tensor, summarizes: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """The rotated queries [S, H, D], and keys and values [S, 2, H, D]."""

        def of_stream(stream: str) -> Tensor:
            normed = _norm(getattr(layer, f"{norm}_{stream}"), x_SE)
            return F.linear(normed, getattr(layer, f"{weight}_{stream}").weight)

        x = of_stream("r")
        if not self._dense:
            x = torch.where(summarizes[:, None], of_stream("s"), x)
        x_S3HD = self._rotated(x, rotary)
        return x_S3HD[:, 0], x_S3HD[:, 1:]

    def _rotated(self, x: Tensor, rotary: Rotary) -> Tensor:
        """[S, parts, H, D] of the parts [S, parts * E], of which the last are values, which do not rotate."""
        config = self._model.config
        x_SPHD = x.view(len(x), -1, config.heads, config.head_dim)
        rotated = apply_rope(x_SPHD[:, :-1], rotary.cos_BND[:, :, None], rotary.sin_BND[:, :, None])
        return torch.cat((rotated, x_SPHD[:, -1:]), dim=1)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
