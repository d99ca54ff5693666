"""The MeloFormer Transformer: regular tokens and one summary token per bar, in two streams.

Shape suffixes: B rows, N regular tokens, M summary tokens, H heads, D = E / H channels of a head,
E model width, V padded vocabulary. `s_` and `r_` are the summary and the regular stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Structure, make_attention
from ..kernels.attention import Attention
from ..kernels.dense import CausalAttention
from ..kernels.lookup import Readers, find_readers, sum_of_rows
from ..kernels.structure import KIND_RULE, NEAR_BARS, NO_INSTRUMENT, check_kind_rule
from ..tokens import vocab
from .copying import Copies, copies_of, raise_copied
from .inputs import TABLE_SIZES, ChordGuesses, InputFeatures, read_context
from .layers import DenseLayer, Layer, RMSNorm, Rotary, recomputed

INIT_STD = 0.02
MAX_NEAR_BAR = 10_000  # beyond any song
MAX_NEAR_BARS = 100  # each costs a comparison of every pair of tokens
DENSE = "dense"  # names the attention of a model without summaries, as backends name those with them


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. `ffn` is the inner width of SwiGLU; `near_bars`, `kind_rule`: see `Structure`.

    A `dense` model has no summaries: it attends to all earlier tokens of the document, of whatever kind.

    Attributes:
        rope_theta, time_theta: bases of RoPE's frequencies for the token index and for musical time.
        time_fraction: part of a head's pairs of channels that musical time rotates; the token index rotates
            the others.
        features: names of the `InputFeatures` whose embeddings are added to the input.
        copy_chords: whether the output can copy the labels that `ChordGuesses` names.
    """

    layers: int
    dim: int
    heads: int
    ffn: int
    vocab_size: int = vocab.VOCAB_SIZE
    near_bars: tuple[int, ...] = NEAR_BARS
    rope_theta: float = 10000.0
    size: str = "custom"  # the name of a preset
    dense: bool = False
    kind_rule: str = KIND_RULE
    time_fraction: float = 0.75
    time_theta: float = 500_000.0
    features: tuple[str, ...] = InputFeatures._fields
    copy_chords: bool = True

    def __post_init__(self):
        for name in ("near_bars", "features"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list when read from JSON
        for name in ("layers", "dim", "heads", "ffn", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("rope_theta", "time_theta"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} must be above 1, got {getattr(self, name)}")
        if not all(0 <= distance <= MAX_NEAR_BAR for distance in self.near_bars):
            raise ValueError(f"near_bars must be in 0..{MAX_NEAR_BAR}")
        if len(set(self.near_bars)) < len(self.near_bars) or len(self.near_bars) > MAX_NEAR_BARS:
            raise ValueError(f"near_bars must be at most {MAX_NEAR_BARS} different distances")
        if unknown := set(self.features) - set(InputFeatures._fields):
            raise ValueError(f"there are no input features {sorted(unknown)}")
        if not 0 <= self.time_fraction <= 1:
            raise ValueError(f"time_fraction must be in 0..1, got {self.time_fraction}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 2 x heads ({self.heads})")
        check_kind_rule(self.kind_rule)
        if self.dense and self.kind_rule != KIND_RULE:
            raise ValueError(f"a dense model has no kind_rule, got '{self.kind_rule}'")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def reads_context(self) -> bool:
        """Whether it reads of a token more than its id, its instrument and its index."""
        return bool(self.features) or self.copy_chords or self.time_pairs > 0

    @property
    def time_pairs(self) -> int:
        """Pairs of a head's channels that musical time rotates."""
        return round(self.time_fraction * self.head_dim / 2)

    @property
    def clocks(self) -> tuple[tuple[int, float], tuple[int, float]]:
        """Pairs of channels and base of their frequencies, of the token index and of musical time."""
        by_index = self.head_dim // 2 - self.time_pairs
        return (by_index, self.rope_theta), (self.time_pairs, self.time_theta)

    @property
    def padded_vocab_size(self) -> int:
        """V: the vocabulary rounded up to a multiple of 64, which matrix products like."""
        return -(-self.vocab_size // 64) * 64

    def as_dense(self) -> "ModelConfig":
        """A dense model of as many parameters: what a layer saves on summaries, 6 dim^2, widens its FFN."""
        if self.dense:
            return self
        no_rule = {"near_bars": NEAR_BARS, "kind_rule": KIND_RULE}
        return replace(self, dense=True, ffn=self.ffn + 2 * self.dim, **no_rule)


SIZES: dict[str, ModelConfig] = {
    "small": ModelConfig(size="small", layers=6, dim=256, heads=4, ffn=2496),  # 17M parameters
    "base": ModelConfig(size="base", layers=12, dim=512, heads=8, ffn=2752),  # 85M
    "large": ModelConfig(size="large", layers=16, dim=768, heads=12, ffn=2816),  # 200M
    "xlarge": ModelConfig(size="xlarge", layers=24, dim=1024, heads=16, ffn=2688),  # 450M
}


# Two kinds of layers times the numbers of summaries that rows have (`summary_room`): more than PyTorch's 8.
RECOMPILE_LIMIT = 256
RECOMPUTE = ("none", "ffn", "layer")  # what a backward may compute again, to save memory


class Context(NamedTuple):
    """What `MeloFormer.read` finds in the tokens of a batch, without any weight.

    Attributes:
        rows: int64 [reads, B, N], what `embed` adds up: rows of the joined table of embeddings.
        readers: for the gradient of that table, if there is to be one.
        onset: as in `InputFeatures`; None if the model keeps no musical time.
        copies: labels of chords; None if the model copies none.
    """

    rows: Tensor
    readers: Readers | None
    onset: Tensor | None
    copies: Copies | None


class MeloFormer(nn.Module):
    """Predicts the next token of packed songs from tokens, instruments and summaries of past bars.

    Initialised as GPT-2 is: normal with deviation 0.02, and for the projections that end in a
    residual stream 0.02 / sqrt(2 x layers).

    Args:
        config: its shape.
        recompute: one of `RECOMPUTE`; what does not change the results, but time and memory.
    """

    def __init__(self, config: ModelConfig, recompute: str = "none"):
        super().__init__()
        self.config, self.recompute = config, recompute
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.dim)
        self.instrument_embedding = nn.Embedding(NO_INSTRUMENT + 1, config.dim)
        self.feature_embeddings = nn.ModuleDict(
            {name: nn.Embedding(getattr(TABLE_SIZES, name), config.dim) for name in config.features}
        )
        shape = config.dim, config.heads, config.ffn
        if config.dense:
            self.layers = nn.ModuleList(DenseLayer(*shape) for _ in range(config.layers))
        else:
            self.summary_embedding = nn.Parameter(torch.empty(config.dim))
            last = config.layers - 1
            self.layers = nn.ModuleList(Layer(*shape, last=i == last) for i in range(config.layers))
        for layer in self.layers:
            layer.recompute_ffn = recompute == "ffn"
        self.norm_out = RMSNorm(config.dim)
        if config.copy_chords:
            self.copy_gate = nn.Linear(config.dim, len(ChordGuesses._fields), bias=False)
        self._initialise()

    def _initialise(self) -> None:
        if self.device.type == "meta":  # there, PyTorch would import its compiler in order to do nothing
            return
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 or name == "summary_embedding":
                nn.init.normal_(parameter, std=INIT_STD)
        residual_std = INIT_STD / (2 * self.config.layers) ** 0.5
        for layer in self.layers:
            for projection in layer.residual_projections:
                nn.init.normal_(projection.weight, std=residual_std)

    def compile_layers(self, **options) -> None:
        """Compile each layer, for training mode alone; other modes have other shapes and less to do.

        Layers of one kind share their code. Shapes are static, a new one compiles anew; but for the number of
        summaries, if the attention allows. Hooks of a layer, as sharding has them, run outside of what is
        compiled.

        Args:
            options: for `torch.compile`.
        """
        config = torch._dynamo.config
        config.optimize_ddp = False  # it would cut layers up; gradients travel between layers anyway
        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        # A dense model may attend document by document, which no graph can hold for all batches.
        whole = not self.config.dense
        compiled = torch.compile(_forward, fullgraph=whole, dynamic=False, **options)
        for layer in self.layers:
            layer.forward = partial(_compiled_forward, compiled, layer)

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    def attention_for(self, structure: Structure, name: str = "auto") -> Attention | CausalAttention:
        """The attention of a batch, by the name of a backend; that of a dense model is "dense".

        Raises:
            ValueError, RuntimeError: the name is unknown, or none for this model or this device.
        """
        if not self.config.dense:
            return make_attention(structure, name)
        if name not in ("auto", DENSE):
            raise ValueError(f"a dense model has no attention '{name}'")
        return CausalAttention(structure, self.device)

    def read(self, ids_BN: Tensor, structure: Structure) -> Context:
        """What `forward` computes first: it can be made ahead, beside other work. Arguments as there."""
        features = onset = copies = None
        config = self.config
        if config.reads_context:
            features, guesses = read_context(ids_BN, structure)
            onset = features.onset if config.time_pairs else None
            copies = copies_of(guesses) if config.copy_chords else None
        rows = self.rows_of(ids_BN, structure.inst, features)
        has_gradient = ids_BN.is_cuda and self.training and torch.is_grad_enabled()
        readers = find_readers(rows, self._first_rows()[-1]) if has_gradient else None
        return Context(rows, readers, onset, copies)

    def forward(
        self,
        ids_BN: Tensor,
        structure: Structure,
        attention: Attention | CausalAttention | str = "auto",
        context: Context | None = None,
    ) -> Tensor:
        """Logits of the next token, [B, N, V].

        Args:
            ids_BN: token ids, int64 [B, N].
            structure: of the same tokens; unless the model is dense, with its near_bars and kind_rule.
            attention: a name, or what `attention_for(structure)` returned (make it once per batch if
                the model runs more than once on it, or is compiled).
            context: what `read(ids_BN, structure)` returned, if it was called ahead.

        Rows and documents do not influence each other, nor does padding; its own logits mean nothing.
        """
        if ids_BN.shape != structure.doc.shape:
            raise ValueError(f"ids {list(ids_BN.shape)} do not fit structure {list(structure.doc.shape)}")
        for name in () if self.config.dense else ("near_bars", "kind_rule"):
            its, mine = getattr(structure, name), getattr(self.config, name)
            if its != mine:
                raise ValueError(f"structure has {name} {its}, not {mine}")
        if isinstance(attention, str):
            attention = self.attention_for(structure, attention)

        rows, readers, onset_BN, copies = self.read(ids_BN, structure) if context is None else context
        r_BNE = self.embed(rows, readers)
        recomputes = self.recompute == "layer" and torch.is_grad_enabled()
        run = recomputed if recomputes else _run
        rotary_r = self.rotary_of_tokens(structure.position, structure.bar, onset_BN)
        if self.config.dense:
            for layer in self.layers:
                r_BNE = run(layer, r_BNE, attention, rotary_r)
        else:
            s_BME = self.summary_embedding.to(r_BNE.dtype)
            s_BME = s_BME.repeat(*structure.summary_doc.shape, 1)  # laid out as any layer's
            rotary_s = self.rotary_of_summaries(structure.summary_position, structure.summary_bar)
            for layer in self.layers:
                s_BME, r_BNE = run(layer, s_BME, r_BNE, attention, rotary_s, rotary_r)
        return self.logits(r_BNE, copies)

    def rows_of(self, ids_BN: Tensor, inst_BN: Tensor, features: InputFeatures | None) -> Tensor:
        """What `embed` adds up of tokens, int64 [reads, B, N]; `features` None if the model reads none."""
        each = [ids_BN, inst_BN.long(), *(getattr(features, name) for name in self.feature_embeddings)]
        return torch.stack([x + first if first else x for x, first in zip(each, self._first_rows())])

    def embed(self, rows: Tensor, readers: Readers | None = None) -> Tensor:
        """What the first layer reads of the tokens: [B, N, E]. `rows`, `readers`: see `Context`."""
        # Streams are in the dtype that products are computed in: between layers nothing is done but to add
        # and to norm, both bound by memory.
        return sum_of_rows(torch.cat(self._input_tables()), rows, self._compute_dtype(), readers)

    def _input_tables(self) -> list[Tensor]:
        tables = self.token_embedding, self.instrument_embedding, *self.feature_embeddings.values()
        return [table.weight for table in tables]

    def _first_rows(self) -> list[int]:
        """Of each table in the joined one, and the number of rows of that."""
        return [*accumulate(map(len, self._input_tables()), initial=0)]

    def input_table(self) -> tuple[Tensor, list[int]]:
        """What `embed` adds up, as one table [rows, E] without gradient, and at which row tokens, instruments
        and the features begin in it."""
        return torch.cat(self._input_tables()).detach(), self._first_rows()[:-1]

    def rotary_of_tokens(self, position_BN: Tensor, bar_BN: Tensor, onset_BN: Tensor | None) -> Rotary:
        """RoPE of regular tokens; `onset_BN` as in `Context`."""
        # Where a token sounds, in steps, as if every bar were as long as a bar can be: what repeats from bar
        # to bar repeats at the same distance in this time, which a token index cannot express.
        time_BN = bar_BN * vocab.MAX_BAR_STEPS
        if onset_BN is not None:
            time_BN = time_BN + (onset_BN - 1).clamp(min=0)
        return self._rotary(position_BN, time_BN)

    def rotary_of_summaries(self, position_BM: Tensor, bar_BM: Tensor) -> Rotary:
        """RoPE of summaries, at the last token of the bar and at the end of its time."""
        return self._rotary(position_BM, (bar_BM + 1) * vocab.MAX_BAR_STEPS)

    def logits(self, r_BNE: Tensor, copies: Copies | None) -> Tensor:
        """Logits [B, N, V] from the stream after the last layer; `copies` as in `Context`."""
        r_BNE = self.norm_out(r_BNE)
        logits_BNV = F.linear(r_BNE, self.token_embedding.weight)
        if self.config.copy_chords:
            logits_BNV = raise_copied(logits_BNV, self.copy_gate(r_BNE), copies)
        return logits_BNV

    def _rotary(self, position_BN: Tensor, time_BN: Tensor) -> Rotary:
        clocks = zip((position_BN, time_BN), self.config.clocks)
        return Rotary([(x_BN, *clock) for x_BN, clock in clocks if clock[0]], self._compute_dtype())

    def _compute_dtype(self) -> torch.dtype:
        device = self.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.token_embedding.weight.dtype

    def num_parameters(self) -> int:
        """Parameters, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _run(layer: nn.Module, *args):
    return layer(*args)


def _forward(layer: nn.Module, *args):
    return type(layer).forward(layer, *args)


def _compiled_forward(compiled: Callable, layer: nn.Module, *args):
    if not layer.training:
        return _forward(layer, *args)
    if isinstance(layer, Layer) and args[2].any_summaries:
        s_BME, _, _, rotary_s, _ = args
        for x in (s_BME, rotary_s.cos_BND, rotary_s.sin_BND):  # by now: hooks of the layer may copy them
            torch._dynamo.maybe_mark_dynamic(x, 1)
    return compiled(layer, *args)
