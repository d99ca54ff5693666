"""A model on a few rows, each a token or a summary, in as few operations as can be: what a step is made of.

Between two operations the weights of a layer have passed through the processor's caches and pushed out
everything else, so even the smallest one costs tens of microseconds: there are no modules here but their
weights, and RoPE is three operations for queries, keys and values at once.

Shape suffixes: R rows, P parts of a projection (queries, keys, values), H heads, D channels of a head,
E model width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..model.inputs import ChordGuesses
from ..model.layers import DenseLayer, Layer, RMSNorm, frequencies
from ..model.token_reader import TokenFacts
from ..model.transformer import MeloFormer
from ..tokens import vocab
from .cache import indices


class Turn(NamedTuple):
    """The tables of RoPE for a projection [R, 3, H, D]: [R, 3, 1, D] each, which leave the values alone."""

    cos: Tensor
    sin: Tensor  # negative in the first half of D

    def __call__(self, x_RPHD: Tensor) -> Tensor:
        """Rotates [R, 3, H, D]."""
        return torch.addcmul(x_RPHD * self.cos, x_RPHD.roll(x_RPHD.shape[3] // 2, 3), self.sin)

    def of_keys_and_values(self) -> "Turn":
        return Turn(self.cos[:, 1:], self.sin[:, 1:])


class Rows(NamedTuple):
    """What the first layer reads of some tokens, how they are rotated, and which labels they may copy."""

    x_RE: Tensor
    turn: Turn
    guesses: Tensor  # ids [R, 6], see `ChordGuesses`


class RowModel:
    """The weights of a model in eval mode, which must not change meanwhile: what `MeloFormer.forward` does.

    Args:
        int8: round those of the layers to 8 bits.

    Raises:
        UserError: see `require_int8`.

    Attributes:
        layers: one `RowLayer` for the tokens in each layer.
        summary_layers: the same for the summaries; none if the model is dense.
    """

    def __init__(self, model: MeloFormer, int8: bool = False):
        config, device = model.config, model.device
        if int8:
            require_int8(device)
        self._dtype, self._device = model.token_embedding.weight.dtype, device
        self.layers = [RowLayer(layer, "r", config.head_dim, int8) for layer in model.layers]
        self.summary_layers: list[RowLayer] = []
        if not config.dense:
            self.summary_layers = [RowLayer(layer, "s", config.head_dim, int8) for layer in model.layers]
            self._summary_1E = model.summary_embedding.detach()[None]
        self._table, self._first = model.input_table()
        self._features = tuple(model.feature_embeddings)
        outputs = [model.token_embedding.weight[: vocab.VOCAB_SIZE]]
        if config.copy_chords:
            outputs.append(model.copy_gate.weight)
        self._norm_out, self._output = _Norm(model.norm_out), _Product(torch.cat(outputs))

        of_half = torch.cat([frequencies(*clock, device) for clock in config.clocks])
        (by_index, _), (by_time, _) = config.clocks
        self._clock = indices([0] * by_index + [1] * by_time, device).repeat(6)
        still = torch.zeros_like(of_half).repeat(2)
        self._frequency = torch.cat([of_half.repeat(4), still])  # [3 * D]
        self._sign = torch.cat([-torch.ones_like(of_half), torch.ones_like(of_half)]).repeat(3)

    def rows(self, facts: Sequence[TokenFacts]) -> Rows:
        """`MeloFormer.embed` and `rotary_of_tokens` of these tokens."""
        columns = [(*_clocks(token), *token.guesses, *self._inputs(token)) for token in facts]
        on_device = indices(columns, self._device)
        clocks, guesses, inputs = on_device.split((2, len(ChordGuesses._fields), len(self._first)), dim=1)
        return Rows(F.embedding(inputs, self._table).sum(dim=1), self._turn(clocks), guesses)

    def summary(self, position: int, bar: int) -> tuple[Tensor, Turn]:
        """The summary of a bar [1, E] before the first layer, and `rotary_of_summaries`.

        Args:
            position: of the last token of the bar.
        """
        clocks = indices([[position, (bar + 1) * vocab.MAX_BAR_STEPS]], self._device)
        return self._summary_1E, self._turn(clocks)

    def logits(self, x_RE: Tensor, guesses: Tensor) -> Tensor:
        """`MeloFormer.logits` of the stream after the last layer: [R, VOCAB_SIZE]."""
        product = self._output(*self._norm_out(x_RE))
        logits, gates = product[:, : vocab.VOCAB_SIZE], product[:, vocab.VOCAB_SIZE :]
        if gates.shape[1]:
            gates = gates * (guesses > 0)
            if logits.device.type == "cpu":
                return logits.scatter_add_(1, guesses, gates)
            for guess in range(
                gates.shape[1]
            ):  # two may name one label, and the order of a sum must be fixed
                logits.scatter_add_(1, guesses[:, guess, None], gates[:, guess, None])
        return logits

    def _inputs(self, token: TokenFacts) -> list[int]:
        """Rows of the joint table that are added up for a token."""
        values = (token.token, token.inst, *(getattr(token.features, name) for name in self._features))
        return [first + value for first, value in zip(self._first, values)]

    def _turn(self, clocks_R2: Tensor) -> Turn:
        angle = clocks_R2.float().index_select(1, self._clock) * self._frequency
        cos, sin = angle.cos().to(self._dtype), angle.sin().mul_(self._sign).to(self._dtype)
        return Turn(*(table.view(len(angle), 3, 1, -1) for table in (cos, sin)))


def _clocks(token: TokenFacts) -> tuple[int, int]:
    """Token index and musical time of a token, see `MeloFormer.rotary_of_tokens`."""
    return token.position, token.bar * vocab.MAX_BAR_STEPS + max(token.features.onset - 1, 0)


class RowLayer:
    """A layer for rows of one of its streams."""

    def __init__(self, layer: Layer | DenseLayer, stream: str, head_dim: int, int8: bool):
        """`stream`: "r" for tokens, "s" for summaries."""
        self._shape = -1, 3, layer.heads, head_dim
        of_stream = {name: getattr(layer, f"{name}_{stream}") for name in ("norm", "qkv", "out")}
        self._norm, self._norm_ffn = _Norm(of_stream["norm"]), _Norm(layer.norm_ffn)
        product = _Int8Product if int8 else _Product
        self._qkv = product(of_stream["qkv"].weight)
        self._out = None if of_stream["out"] is None else product(of_stream["out"].weight)
        self._kv2 = product(layer.kv2.weight) if stream == "s" else None
        self._gate_up, self._down = product(layer.ffn.gate_up.weight), product(layer.ffn.down.weight)

    def project(self, x_RE: Tensor, turn: Turn) -> Tensor:
        """Queries, keys and values, rotated: [R, 3, H, D]."""
        return turn(self._qkv(*self._norm(x_RE)).view(self._shape))

    def project_again(self, o_RE: Tensor, turn: Turn) -> Tensor:
        """The keys and values that tokens see of a summary, from what it attended to: [R, 2, H, D]."""
        return turn.of_keys_and_values()(self._kv2(o_RE).view(-1, 2, *self._shape[2:]))

    def finish(self, x_RE: Tensor, o_RE: Tensor) -> Tensor:
        """The stream after the layer, from what attention made of it; a last layer has none for summaries."""
        if self._out is None:
            return x_RE
        x_RE = self._out.added_to(x_RE, o_RE)
        gate, up = self._gate_up(*self._norm_ffn(x_RE)).chunk(2, dim=1)
        return self._down.added_to(x_RE, F.silu(gate, inplace=True).mul_(up))


class _Norm:
    """RMSNorm of rows, and a factor by which a product of them is still to be multiplied."""

    def __init__(self, norm: RMSNorm):
        self._gain, self._eps = norm.weight.detach(), norm.eps
        self._at_once = self._gain.device.type == "cpu" and self._gain.dtype.itemsize >= 4

    def __call__(self, x_RE: Tensor) -> tuple[Tensor, float]:
        rows, dim = x_RE.shape
        if rows == 1 and self._at_once:  # half the operations; to read a number back costs nothing there
            x_E = x_RE[0]
            return x_RE * self._gain, (torch.dot(x_E, x_E).item() / dim + self._eps) ** -0.5
        return F.rms_norm(x_RE, self._gain.shape, self._gain, self._eps), 1.0


class _Product:
    """Products of rows [R, in] with weights [out, in]: [R, out]."""

    def __init__(self, weight: Tensor):
        self._weight, self._nothing = weight.detach().t(), weight.detach().new_zeros(1)

    def __call__(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return torch.addmm(self._nothing, x, self._weight, beta=0, alpha=factor)

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(y, x, self._weight)


class _Int8Product:
    """The same with weights of 8 bits, so a quarter of single precision is read; on a CPU alone.

    The weights of an output are rounded to multiples of a step of its own, at most 127 of it, and rows to
    bfloat16: the only dtype for which PyTorch's kernel for such weights is fast.
    """

    def __init__(self, weight: Tensor):
        weight = weight.detach().float()
        step = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self._step = step.bfloat16()
        multiples = weight / self._step.float()[:, None]
        self._weight = multiples.round().clamp(-127, 127).to(torch.int8)

    def __call__(self, x: Tensor, factor: float = 1.0) -> Tensor:
        product = torch._weight_int8pack_mm(x.bfloat16(), self._weight, self._step).to(x.dtype)
        return product if factor == 1 else product.mul_(factor)

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        return y + torch._weight_int8pack_mm(x.bfloat16(), self._weight, self._step)


def require_int8(device: torch.device) -> None:
    """Raises UserError if there are no products with weights of 8 bits."""
    if device.type != "cpu":
        raise UserError("int8 weights are for the CPU: add --device cpu, or leave int8 out")
    if not hasattr(torch, "_weight_int8pack_mm"):  # no part of the documented interface
        raise UserError(f"PyTorch {torch.__version__} has no products with int8 weights: leave int8 out")
