"""Models that read of a token its id, its instrument and its index alone: what the other inputs cost."""

from dataclasses import replace

from meloformer.model.transformer import ModelConfig

ALL, TOKENS = "all", "tokens"
WITHOUT = {TOKENS: "musical inputs"}  # what a row lacks, as its label says


def read_by(config: ModelConfig, inputs: str) -> ModelConfig:
    """The model of this shape that reads ALL inputs or TOKENS alone: no `InputFeatures`, no musical time, no
    labels to copy."""
    if inputs == ALL:
        return config
    return replace(config, features=(), time_fraction=0.0, copy_chords=False)
