"""Files of tensors: what they hold is compared with what they should hold before any of it is read."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..files import open_to_read
from .files import MAX_TEXT, check_content, damaged, one_line

# Dtype and shape of each tensor of a file, by name; the dtype is None if MeloFormer writes none such.
Layout = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(file: Path, manifest: dict) -> tuple[Layout, dict[str, str]]:
    """What a safetensors file holds, and its text metadata.

    Raises:
        UserError: it differs from what the manifest says, is no such file, or has a header longer than any
            that MeloFormer writes.
    """
    check_content(file, manifest)
    with open_to_read(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_TEXT:
        raise damaged(file, f"its header has more than {MAX_TEXT >> 20} MB")
    try:
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            layout = {
                name: (_DTYPES.get(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()
            }
            return layout, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise damaged(file, one_line(error)) from None


def load_tensors(
    file: Path, found: Layout, expected: Layout, device: str | torch.device
) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        found: by `read_header`.
        expected: what it should hold.

    Raises:
        UserError: it holds something else, or numbers that are not finite.
    """
    for name in found.keys() - expected.keys():
        raise damaged(file, f"it has a tensor {name[:60]!r}, which its model does not have")
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise damaged(file, f"it lacks {name}")
        its_dtype, its_shape = found[name]
        if its_shape != shape:
            raise damaged(file, f"{name} has the shape {str(list(its_shape))[:60]} instead of {list(shape)}")
        if its_dtype != dtype:
            raise damaged(file, f"{name} is not of {str(dtype).removeprefix('torch.')}")
    try:
        tensors = load_file(file, str(device))
    except (OSError, SafetensorError) as error:
        raise damaged(file, one_line(error)) from None
    for name, tensor in tensors.items():
        # A sum is finite only if all its terms are, and several times as fast; but it may overflow.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise damaged(file, f"{name} has values that are not finite")
    return tensors
