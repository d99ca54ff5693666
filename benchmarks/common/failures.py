"""How a benchmark goes on after one of its measurements failed."""

import gc
from contextlib import suppress
from pathlib import Path

import torch

from meloformer.errors import UserError


def one_line(error: BaseException) -> str:
    """Type and message of an error in at most 200 characters; of a UserError the message alone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return (kind + " ".join(lines[:2]))[:200]


def free_memory() -> None:
    """Frees unused GPU memory. Call it after the `except` block: until then the traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a lost GPU is reported by `check_gpu`
            torch.cuda.empty_cache()


def check_gpu(path: Path) -> None:
    """Checks that the GPU still works: after an illegal memory access nothing does in this process.

    Raises:
        UserError: it does not; the message names `path`, which has the results so far.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise UserError(f"the GPU failed ({one_line(error)}); {path} has what was measured") from None
