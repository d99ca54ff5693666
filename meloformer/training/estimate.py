"""The memory that a run needs, by formula, and the error for a lack of it."""

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
    """Bytes of the activations saved for the backward of `tokens` regular and summary tokens.

    A layer saves for each token, at `compute_bytes` a value, 10 vectors of width `dim` (the residual stream
    before and after its attention, the norms of both, the joint projection, of which queries and keys are
    kept rotated as well, and the attention's output) and 3 of width `ffn`. The loss holds the logits and
    their gradient. Masks, plans and workspace of the attention are not counted.

    What is recomputed (`recompute`, see `MeloFormer`) exists for one layer at a time: with "layer" all but
    the layer's input, with "ffn" the feed-forward network and its norm.
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

    Computing in bf16 adds a copy of the weights. Several processes that accumulate batches hold gradients
    twice: the accumulated ones and the buffer in which they are exchanged.

    With sharded state a process holds its shard of weights, gradients and moments, plus the full weights of
    two layers: the one that computes and the next. The bf16 copy is full and kept for the backward. Gradients
    are full until they are exchanged: those of two layers, or all of them if batches are accumulated.
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
    """Total memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or the host is out of memory."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def out_of_memory(config: TrainConfig, device: torch.device, world: int = 1) -> UserError:
    """The error for a lack of memory, which names the flag to change."""
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
