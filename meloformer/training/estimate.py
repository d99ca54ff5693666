"""What a run will need: memory by formula before the first step, time by one measured step."""

import os
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..kernels.structure import MIN_SUMMARIES
from ..model.transformer import ModelConfig
from .config import TrainConfig

GB = 1e9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process. `activations` are those of one batch of `batch_size` rows."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def activation_bytes(model: ModelConfig, tokens: int, compute_bytes: int, recompute: str = "none") -> int:
    """What a backward pass finds saved for `tokens` regular and summary tokens, and the loss needs at once.

    A layer saves of each token, in the precision it computes in (`compute_bytes` a value), 10 vectors of
    width `dim` (the stream before and after its attention, the norms of both, the joint projection, of which
    queries and keys are kept turned as well, and the attention's output) and 3 of width `ffn`. The loss
    holds the logits and their gradient.
    Masks, plans and work space of the attention are not counted. What is computed again (`recompute`, see
    `MeloFormer`) is there for one layer at a time: all of it but the stream that goes in, or the
    feed-forward network and its norm.
    """
    ffn = model.dim + 3 * model.ffn
    layer = 9 * model.dim + ffn
    at_once = {"none": 0, "ffn": ffn, "layer": layer - model.dim}[recompute]
    values = model.layers * (layer - at_once) + at_once + 2 * model.padded_vocab_size
    return tokens * compute_bytes * values


def estimate_memory(
    config: TrainConfig, model: ModelConfig, parameters: int, compute_bytes: int, world: int
) -> MemoryEstimate:
    """The formula: float32 weights, gradients, two moments of AdamW, and `activation_bytes`.

    Computing in two bytes adds a copy of the weights. Several processes that add up batches hold gradients
    twice: what is added up, and where it is exchanged.

    Sharded, a process holds its share of the four, besides two layers' weights, whole: of the one that
    computes and the next. The copy of the weights is kept for the backward, as a whole. Gradients are whole
    until they are exchanged: those of two layers, or all if batches are accumulated before.
    """
    copies = parameters * compute_bytes if compute_bytes < 4 else 0
    twice = world > 1 and config.gradient_accumulation_steps > 1
    weights, gradients = 4 * parameters, 4 * parameters * (2 if twice else 1)
    optimizer = 8 * parameters
    if config.shard_state and world > 1:
        two_layers = 4 * parameters * 2 // model.layers
        accumulated = 4 * parameters if config.gradient_accumulation_steps > 1 else 0
        weights = 4 * parameters // world + two_layers
        gradients = 4 * parameters // world + two_layers + accumulated
        optimizer //= world
    tokens = config.batch_size * (config.max_seq_len + MIN_SUMMARIES)
    return MemoryEstimate(
        weights=weights + copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(model, tokens, compute_bytes, config.checkpoint_activations),
    )


def device_bytes(device: torch.device) -> int:
    """Memory of the device, as a whole."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or the host, has no memory left."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def out_of_memory(config: TrainConfig, device: torch.device, world: int = 1) -> UserError:
    """The error for it, which names the flag to turn."""
    if config.batch_size > 1:
        advice = (
            f"lower --batch_size (now {config.batch_size}) and raise --gradient_accumulation_steps (now "
            f"{config.gradient_accumulation_steps}) by the same factor: the steps stay the same"
        )
    else:
        advice = f"lower --max_seq_len (now {config.max_seq_len}) or take a smaller --model_size"
        if world > 1 and not config.shard_state:
            advice = f"try --shard_state, or {advice}"
        if config.checkpoint_activations != "layer":
            advice = f"try --checkpoint_activations layer, or {advice}"
        if config.precision == "fp32":
            advice = f"try --precision bf16, or {advice}"
    return UserError(
        f"out of memory on {device}, which has {device_bytes(device) / GB:.1f} GB: {advice}; --dry_run shows "
        "what takes how much"
    )
