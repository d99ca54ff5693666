"""The model's part of a step by fused kernels: what `PlainForward` computes, in five launches a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.decode import MAX_NEAR_BAR, Rows, Weights
from ...kernels.decode_products import READS, SUMMARIZES
from ...model.layers import DenseLayer, Layer, RMSNorm
from ...model.transformer import MeloFormer, ModelConfig
from ...tokens import vocab
from .cache import SlotCache
from .reader import Facts, SlotReader


def has_kernels(config: ModelConfig) -> bool:
    """Whether there are fused kernels for such a model: those of the rule that models are trained with."""
    power_of_two = config.head_dim >= 32 and config.head_dim & (config.head_dim - 1) == 0
    near = max(config.near_bars, default=0) <= MAX_NEAR_BAR
    return config.kind_rule == "any" and near and power_of_two


class FusedForward:
    """`PlainForward` for a model that `has_kernels`; its arguments and results are the same.

    Attributes:
        rows: what the kernels of the layers read and write.
        table: [rows, E], the embeddings of tokens, instruments and features below each other.
        first: int64, at which of its rows each of them begins.
        summary: [E], with what a summary begins; of a dense model nobody reads it.
    """

    def __init__(self, model: MeloFormer, cache: SlotCache, reader: SlotReader):
        config, dtype = model.config, model.token_embedding.weight.dtype
        if not has_kernels(config):
            raise ValueError("there are no fused kernels for this model")
        self._model, self._cache, self._reader = model, cache, reader
        slots = cache.keys.shape[2]
        self.rows = Rows(
            slots, config.heads, config.head_dim, config.ffn, cache.room, cache.bars, dtype, model.device
        )
        self._weights = [_weights(layer) for layer in model.layers]
        self.table, first = model.input_table()
        self.first = torch.tensor(first, device=model.device)
        self.summary = self.table[0] if config.dense else model.summary_embedding.detach()
        self._head = _with_gains(model.norm_out, model.token_embedding.weight[: vocab.VOCAB_SIZE])
        self._gates = self._head[:0]
        if config.copy_chords:
            self._gates = _with_gains(model.norm_out, model.copy_gate.weight)

    def begin(self, slot: int) -> None:
        self.rows.group[slot] = -1

    def __call__(self, facts: Facts, reads: Tensor, summarizes: Tensor, bar: Tensor) -> Tensor:
        model, cache, rows = self._model, self._cache, self.rows
        rows.mode.copy_(torch.where(summarizes, SUMMARIZES, torch.where(reads, READS, 0)))
        place = torch.where(reads, facts.position, cache.nowhere)
        rows.place.copy_(torch.where(summarizes, cache.room + bar, place))
        rows.past.copy_(torch.where(summarizes, cache.room + cache.bars + bar, cache.nowhere))
        features = [getattr(facts.features, name) for name in model.feature_embeddings]
        indices = torch.stack((facts.token, facts.inst, *features), dim=1) + self.first
        embedded = F.embedding(indices, self.table).sum(dim=1)
        rows.x.copy_(torch.where(summarizes[:, None], self.summary, embedded))
        rotary = model.rotary_of_tokens(
            facts.position[:, None],
            (bar + summarizes.long())[:, None],
            torch.where(summarizes, 0, facts.features.onset)[:, None],
        )
        rows.cos.copy_(rotary.cos_BND[:, 0, : rows.dim // 2])
        rows.sin.copy_(rotary.sin_BND[:, 0, : rows.dim // 2])

        return self.logits(facts.position, bar, facts.inst, torch.stack(facts.guesses, dim=1))

    def logits(self, position: Tensor, bar: Tensor, inst: Tensor, guesses: Tensor) -> Tensor:
        """Logits [S, VOCAB_SIZE] when `rows` is filled; all int64: of the tokens [S], and [S, guesses]."""
        model, rows, reader = self._model, self.rows, self._reader
        histories = reader.bar_of, reader.inst_of, reader.kind_of
        rows.find_places(*histories, position, bar, inst, model.config.near_bars, model.config.dense)
        for keys, weights, layer in zip(self._cache.keys, self._weights, model.layers):
            rows.layer(weights, keys, layer.norm_r.eps)
        return rows.logits(self._head, self._gates, guesses, model.norm_out.eps)


def _with_gains(norm: RMSNorm, weight: Tensor) -> Tensor:
    """The weight [columns, E] of a product with what comes out of `norm`, for one with x / rms(x)."""
    return (weight.detach().float() * norm.weight.detach().float()).to(weight.dtype)


def _weights(layer: Layer | DenseLayer) -> Weights:
    qkv_r, out_r = _with_gains(layer.norm_r, layer.qkv_r.weight), layer.out_r.weight
    ffn = _with_gains(layer.norm_ffn, layer.ffn.gate_up.weight), layer.ffn.down.weight
    if isinstance(layer, DenseLayer):  # no row ever asks for the weights of the other stream
        weights = qkv_r, qkv_r, out_r, out_r, qkv_r
    else:
        # The summary stream ends with the keys and values of the last layer, which has no `out_s`.
        out_s = out_r if layer.out_s is None else layer.out_s.weight
        weights = qkv_r, _with_gains(layer.norm_s, layer.qkv_s.weight), out_r, out_s, layer.kv2.weight
    return Weights(*(weight.detach() for weight in (*weights, *ffn)))
