"""What a measurement does when a part of it fails, so that the others go on."""

import gc
from contextlib import suppress
from pathlib import Path

import torch

from meloformer.errors import UserError


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return (kind + " ".join(lines[:2]))[:200]


def free_memory() -> None:
    """Give back what nobody uses. After an error: when it is forgotten, for its frames hold tensors."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a GPU that is lost is told by `check_gpu`
            torch.cuda.empty_cache()


def check_gpu(path: Path) -> None:
    """After an illegal access nothing works any more in this process.

    Raises:
        UserError: so it is; `path` has the figures until then.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise UserError(f"the GPU failed ({one_line(error)}); {path} has what was measured") from None
