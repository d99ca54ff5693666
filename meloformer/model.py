"""The MeloFormer Transformer: regular tokens and one summary token per bar, in two streams.

Shape suffixes: B rows, N regular tokens, M summary tokens, H heads, D = E / H channels of a head,
E model width, V padded vocabulary. `s_` and `r_` are the summary and the regular stream.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import vocab
from .kernels import Structure, make_attention
from .kernels.attention import Attention
from .kernels.structure import NEAR_BARS, NO_INSTRUMENT

IGNORE = -100  # a target that counts for nothing
INIT_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. `ffn` is the inner width of SwiGLU; `near_bars` is that of `Structure`."""

    layers: int
    dim: int
    heads: int
    ffn: int
    vocab_size: int = vocab.VOCAB_SIZE
    near_bars: tuple[int, ...] = NEAR_BARS
    rope_theta: float = 10000.0
    size: str = "custom"  # the name of a preset

    def __post_init__(self):
        object.__setattr__(self, "near_bars", tuple(self.near_bars))  # a list when read from JSON
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 2 x heads ({self.heads})")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def padded_vocab_size(self) -> int:
        """V: the vocabulary rounded up to a multiple of 64, which matrix products like."""
        return -(-self.vocab_size // 64) * 64


SIZES: dict[str, ModelConfig] = {
    "small": ModelConfig(size="small", layers=6, dim=256, heads=4, ffn=2752),  # 17M parameters
    "base": ModelConfig(size="base", layers=12, dim=512, heads=8, ffn=2880),  # 85M
    "large": ModelConfig(size="large", layers=16, dim=768, heads=12, ffn=2816),  # 200M
    "xlarge": ModelConfig(size="xlarge", layers=24, dim=1024, heads=16, ffn=2688),  # 450M
}


class Rotary:
    """RoPE (Su et al., 2021, arXiv:2104.09864) at given positions, channel i paired with i + D / 2.

    The tables are float32 whatever the model computes in: bfloat16 cannot tell distant positions apart.
    """

    def __init__(self, position_BN: Tensor, config: ModelConfig):
        channel = torch.arange(0, config.head_dim, 2, device=position_BN.device, dtype=torch.float32)
        frequency = config.rope_theta ** (-channel / config.head_dim)
        angle_BND = position_BN[..., None].float() * frequency
        angle_BND = torch.cat([angle_BND, angle_BND], dim=-1)
        self.cos_B1ND = angle_BND.cos()[:, None]
        self.sin_B1ND = angle_BND.sin()[:, None]

    def __call__(self, x_BHND: Tensor) -> Tensor:
        first, second = x_BHND.chunk(2, dim=-1)
        turned_BHND = torch.cat([-second, first], dim=-1)
        cos_B1ND, sin_B1ND = self.cos_B1ND.to(x_BHND.dtype), self.sin_B1ND.to(x_BHND.dtype)
        return x_BHND * cos_B1ND + turned_BHND * sin_B1ND


class SwiGLU(nn.Module):
    """(silu(x W1) * x W2) W3 (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Summarize, update, and one feed-forward network for both streams; pre-norm, residual.

    What the last layer would add to the summary stream nobody reads, so it has no output projection
    for it: a parameter without a gradient would stall distributed training.
    """

    def __init__(self, config: ModelConfig, last: bool):
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm_s, self.norm_r = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv_s = nn.Linear(dim, 3 * dim, bias=False)
        self.qkv_r = nn.Linear(dim, 3 * dim, bias=False)
        self.kv2 = nn.Linear(dim, 2 * dim, bias=False)
        self.out_s = None if last else nn.Linear(dim, dim, bias=False)
        self.out_r = nn.Linear(dim, dim, bias=False)
        self.norm_ffn = nn.RMSNorm(dim)
        self.ffn = SwiGLU(dim, config.ffn)

    def forward(
        self, s_BME: Tensor, r_BNE: Tensor, attention: Attention, rotary_s: Rotary, rotary_r: Rotary
    ) -> tuple[Tensor, Tensor]:
        q_s, k_s, v_s = self._split(self.qkv_s(self.norm_s(s_BME)), 3)  # [B, H, M, D]
        q_r, k_r, v_r = self._split(self.qkv_r(self.norm_r(r_BNE)), 3)  # [B, H, N, D]
        k_r = rotary_r(k_r)

        o_s = _join(attention.summarize(rotary_s(q_s), rotary_s(k_s), v_s, k_r, v_r))
        k2_s, v2_s = self._split(self.kv2(o_s), 2)
        o_r = _join(attention.update(rotary_r(q_r), k_r, v_r, rotary_s(k2_s), v2_s))

        r_BNE = r_BNE + self.out_r(o_r)
        r_BNE = r_BNE + self.ffn(self.norm_ffn(r_BNE))
        if self.out_s is not None:
            s_BME = s_BME + self.out_s(o_s)
            s_BME = s_BME + self.ffn(self.norm_ffn(s_BME))
        return s_BME, r_BNE

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, length, parts x E] -> parts of [B, H, length, D]."""
        rows, length, _ = x.shape
        return x.view(rows, length, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _join(x: Tensor) -> Tensor:
    """[B, H, length, D] -> [B, length, E]."""
    return x.transpose(1, 2).flatten(2)


class MeloFormer(nn.Module):
    """Predicts the next token of packed songs from tokens, instruments and summaries of past bars.

    Initialised as GPT-2 is: normal with deviation 0.02, and for the projections that end in a
    residual stream 0.02 / sqrt(2 x layers).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.dim)
        self.instrument_embedding = nn.Embedding(NO_INSTRUMENT + 1, config.dim)
        self.summary_embedding = nn.Parameter(torch.empty(config.dim))
        self.layers = nn.ModuleList(Layer(config, last=i == config.layers - 1) for i in range(config.layers))
        self.norm_out = nn.RMSNorm(config.dim)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 or name == "summary_embedding":
                nn.init.normal_(parameter, std=INIT_STD)
        residual_std = INIT_STD / (2 * self.config.layers) ** 0.5
        for layer in self.layers:
            for projection in (layer.out_s, layer.out_r, layer.ffn.down):
                if projection is not None:
                    nn.init.normal_(projection.weight, std=residual_std)

    def forward(self, ids_BN: Tensor, structure: Structure, attention: Attention | str = "auto") -> Tensor:
        """Logits of the next token, [B, N, V].

        Args:
            ids_BN: token ids, int64 [B, N].
            structure: of the same tokens, with the near_bars of the configuration.
            attention: a backend's name, or what `make_attention(structure)` returned (make it once
                per batch if the model runs more than once on it, or is compiled).

        Rows and documents do not influence each other, nor does padding; its own logits mean nothing.
        """
        if ids_BN.shape != structure.doc.shape:
            raise ValueError(f"ids {list(ids_BN.shape)} do not fit structure {list(structure.doc.shape)}")
        if structure.near_bars != self.config.near_bars:
            raise ValueError(f"structure has near_bars {structure.near_bars}, not {self.config.near_bars}")
        if isinstance(attention, str):
            attention = make_attention(structure, attention)

        r_BNE = self.token_embedding(ids_BN) + self.instrument_embedding(structure.inst)
        s_BME = self.summary_embedding.expand(*structure.summary_doc.shape, -1)
        rotary_s = Rotary(structure.summary_position, self.config)
        rotary_r = Rotary(structure.position, self.config)
        for layer in self.layers:
            s_BME, r_BNE = layer(s_BME, r_BNE, attention, rotary_s, rotary_r)
        return F.linear(self.norm_out(r_BNE), self.token_embedding.weight)

    def num_parameters(self) -> int:
        """Parameters, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def next_token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy in float32, as a sum, so that it adds up over batches and processes.

    Args:
        logits: [B, N, V] any floating dtype.
        targets: int64 [B, N], the token after each; IGNORE (-100) where there is none to predict.

    Returns:
        The sum in nats, and the count (int64) of targets that were not ignored; 0-d tensors.
    """
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return nats, (targets != IGNORE).sum()
