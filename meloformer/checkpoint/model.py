"""The model that a checkpoint describes, checked before anything of its size is made.

A checkpoint that was written by mistake or with malice may name any size. The model file's own size bounds
what its weights can be; their names, shapes and dtypes are those of the model that the configuration
describes, built on torch's meta device, which takes no memory.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..model.transformer import MeloFormer, ModelConfig
from ..tokens import vocab
from .files import damaged
from .schema import brief, read_dataclass
from .tensors import Layout, load_tensors, read_header

MAX_LAYERS = 256  # several times what any model here has; a model takes a millisecond a layer to build
_SMALLEST = 2  # bytes of a weight in the smallest format


def check_tokenizer(file: Path, tokenizer_json: dict) -> None:
    """UserError if a model was trained on another vocabulary, by the version that it is of."""
    if tokenizer_json == vocab.to_json():
        return
    version = tokenizer_json.get("version")
    if version in vocab.EARLIER_VERSIONS.values():
        raise UserError(
            f"{file}: this checkpoint was trained on version {version} of the token format, and this program "
            f"reads version {vocab.FORMAT_VERSION}: run preprocess again and train anew"
        )
    if type(version) is int and version > vocab.FORMAT_VERSION:
        raise UserError(
            f"{file}: this checkpoint was trained on version {brief(version)} of the token format, and this "
            f"program reads version {vocab.FORMAT_VERSION}: update MeloFormer"
        )
    raise UserError(
        f"{file}: this checkpoint was trained on another token vocabulary; use the version of MeloFormer "
        "that wrote it"
    )


def read_config(values: dict, file: Path, weight_bytes: int) -> ModelConfig:
    """The configuration of a model whose weights take `weight_bytes` on disk.

    Args:
        values: the JSON object in `file`.

    Raises:
        UserError: a setting is missing, unknown, of another type, or impossible.
    """
    for name, value in values.items():
        # Each of the sizes is a length of some tensor, or a number of them.
        if type(value) is int and abs(value) > weight_bytes // _SMALLEST:
            raise damaged(file, f"{name} is {brief(value)}, and the weights are of {weight_bytes} bytes")
    try:
        config = read_dataclass(ModelConfig, values, file)
    except ValueError as error:
        raise damaged(file, str(error)[:200]) from None
    if config.layers > MAX_LAYERS:
        raise damaged(file, f"layers is {config.layers}, and a model has at most {MAX_LAYERS}")
    if config.vocab_size != vocab.VOCAB_SIZE:
        raise damaged(file, f"vocab_size is {config.vocab_size}, and {vocab.VOCAB_SIZE} by the tokenizer")
    return config


def read_weights(
    config: ModelConfig, config_file: Path, file: Path, manifest: dict, device: str | torch.device
) -> dict[str, Tensor]:
    """The state dict in `file` of the model that `config_file` describes.

    Raises:
        UserError: the weights are others than such a model has, or not finite.
    """
    found, _ = read_header(file, manifest)
    return load_tensors(file, found, _layout(config, config_file, file.stat().st_size), device)


def _layout(config: ModelConfig, file: Path, weight_bytes: int) -> Layout:
    """Dtype and shape of each weight of a model, by name; none of them is allocated."""
    try:
        with torch.device("meta"):
            state = MeloFormer(config).state_dict()
        needed = sum(tensor.nbytes for tensor in state.values())
    except RuntimeError:  # sizes whose product no integer can hold
        needed = 2**63
    if needed > weight_bytes:
        raise damaged(file, f"its model has {needed:,} bytes of weights, and their file has {weight_bytes:,}")
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
