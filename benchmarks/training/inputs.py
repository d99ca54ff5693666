"""Models that read of a token its id, its instrument and its index alone: what the other inputs cost."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from meloformer.kernels import Structure
from meloformer.model import transformer
from meloformer.model.inputs import ChordGuesses, InputFeatures
from meloformer.model.transformer import ModelConfig

ALL, TOKENS = "all", "tokens"
WITHOUT = {TOKENS: "musical inputs"}  # what a row lacks, as its label says


def read_by(config: ModelConfig, inputs: str) -> ModelConfig:
    """The model of this shape that reads ALL inputs or TOKENS alone: no `InputFeatures`, no musical time, no
    labels to copy."""
    if inputs == ALL:
        return config
    return replace(config, features=(), time_fraction=0.0, copy_chords=False)


def computing(inputs: str):
    """A context inside which a model computes those inputs alone that it reads. What the loss leaves out
    (`forbidden_instruments`) is computed either way."""
    return nullcontext() if inputs == ALL else _nothing_read()


@contextmanager
def _nothing_read() -> Iterator[None]:
    def unread(ids_BN: Tensor, structure: Structure) -> tuple[InputFeatures, ChordGuesses]:
        nothing = torch.zeros_like(ids_BN)
        return InputFeatures(*[nothing] * len(InputFeatures._fields)), ChordGuesses(
            *[nothing] * len(ChordGuesses._fields)
        )

    read = transformer.read_context
    transformer.read_context = unread
    try:
        yield
    finally:
        transformer.read_context = read
