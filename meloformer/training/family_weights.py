"""Weights of the training loss by the family of the token to predict: `--family_weights`."""

import argparse

import torch
from torch import Tensor

from ..tokens import vocab

DEFAULT_WEIGHTS = "CHORD=2,INST=2"  # few tokens, and what a listener hears first if they are wrong
MAX_WEIGHT = 1000.0
# What a song is made of, besides the BOS before it: what a model has to predict.
PREDICTED = tuple(
    family for family in vocab.FAMILIES if family not in (vocab.PAD_FAMILY, vocab.BOS_FAMILY, vocab.RESERVED)
)


def parse_weights(text: str) -> str:
    """An argument like "INST=2,CHORD=1.5" in its normal form: sorted, without weights of 1.

    Raises:
        argparse.ArgumentTypeError: a family that is none, or a weight that is no number from 0 to MAX_WEIGHT.
    """
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        name = name.strip().upper()
        if name not in {family.name for family in PREDICTED}:
            names = ", ".join(family.name for family in PREDICTED)
            raise argparse.ArgumentTypeError(f"'{part}': there is no family '{name}'; there are {names}")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] <= MAX_WEIGHT:
            raise argparse.ArgumentTypeError(f"'{part}': must be like INST=2, from 0 to {MAX_WEIGHT:g}")
    return ",".join(f"{name}={weights[name]:g}" for name in sorted(weights) if weights[name] != 1)


def weight_table(text: str) -> Tensor | None:
    """Weights by token id, float32 [VOCAB_SIZE]; None if all are 1. `text` as `parse_weights` gives it."""
    if not text:
        return None
    given = dict(part.split("=") for part in text.split(","))
    return torch.tensor(
        [float(given.get(vocab.family_of(token).name, 1)) for token in range(vocab.VOCAB_SIZE)]
    )
