"""The useful floating-point operations of a training step, and what a GPU could do: the terms of MFU.

MFU (model FLOPs utilisation; Chowdhery et al., 2022, arXiv:2204.02311) is `training_flops` over what the
GPUs could have done in the same time at `peak_flops`. Only matrix products are counted, and of the attention
only visible pairs; neither padding, nor what activation checkpointing computes again.
"""

import torch

from ..data.pairs import Counts
from ..model.inputs import ChordGuesses
from ..model.transformer import ModelConfig

# Matrix products in bf16 with float32 sums, without sparsity, in TFLOP/s by the vendor's data sheets. The
# first name found in that of the GPU counts.
_PEAK_TFLOPS = {
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "RTX 4090": 165,
}


def peak_flops(device: torch.device) -> float | None:
    """Operations per second of dense bf16 matrix products on a GPU; None if unknown, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in _PEAK_TFLOPS.items() if known in name), None)


def training_flops(model: ModelConfig, counts: Counts) -> float:
    """Operations of forward and backward over a batch: 3 times those of the forward.

    The forward takes 2 per token and weight that the token is multiplied with, and 4 x dim per layer and
    visible pair: the products with the key and with the value. A dense model has no summaries, and its
    pairs are the causal ones.
    """
    dim, layers = model.dim, model.layers
    ffn = 3 * dim * model.ffn
    gates = len(ChordGuesses._fields) * model.copy_chords
    per_token = layers * (4 * dim**2 + ffn) + dim * (model.padded_vocab_size + gates)
    if model.dense:
        return 3.0 * (2 * per_token * counts.tokens + 4 * dim * layers * counts.causal_pairs)
    # The last layer needs of a summary its queries, keys and values, K2 and V2, and no more.
    per_summary = layers * 5 * dim**2 + (layers - 1) * (dim**2 + ffn)
    pairs = layers * (counts.summary_pairs + counts.token_pairs)
    products = per_token * counts.tokens + per_summary * counts.summaries
    return 3.0 * (2 * products + 4 * dim * pairs)
