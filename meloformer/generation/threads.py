"""How many CPU threads take a step of one song."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A thread reads so many bytes of weights in the time in which the others wake up and are waited for, some
# hundred times a token: below, one is faster by itself, above it is not slower by much.
ALONE_BELOW = 128e6


@contextmanager
def alone(yes: bool) -> Iterator[None]:
    """If `yes`, PyTorch computes with one thread inside."""
    threads = torch.get_num_threads()
    if not yes or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
