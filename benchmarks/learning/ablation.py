"""`python -m benchmarks.learning.ablation PART OPTION ...`: trains a model whose attention lacks one part.

PART is one of `PARTS`; the options are those of `python -m meloformer.train`. The run's folder says which
part it lacked, so that `python -m benchmarks.learning` names it. What a part is worth is how much worse the
model learns without it, from the same tokens in the same order.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from meloformer import cli, train
from meloformer.errors import UserError
from meloformer.files import read_json
from meloformer.kernels.attention import Attention
from meloformer.kernels.structure import NO_INSTRUMENT, Structure
from meloformer.model.transformer import MeloFormer
from meloformer.training.config import parse_args

ABLATION = "ablation.json"  # in the folder of a run


def without_summaries(structure: Structure) -> Structure:
    """No token sees a summary: to them all are padding."""
    return replace(structure, summary_doc=torch.full_like(structure.summary_doc, -1))


def without_own_past(structure: Structure) -> Structure:
    """Of its own instrument a token sees no more bars than of the others: the near ones.

    Instruments are told apart by bar, those of 128 bars ago excepted.
    """
    inst = torch.where(structure.inst == NO_INSTRUMENT, structure.inst, structure.bar % 128)
    return replace(structure, inst=inst)


PARTS = {"summaries": without_summaries, "own past": without_own_past}


def lacking(folder: Path) -> str | None:
    """The part that the run in this folder lacked, one of `PARTS`."""
    path = folder / ABLATION
    return read_json(path)["without"] if path.exists() else None


class LackingAttention:
    """The attention of a batch, with summaries made from the whole structure, and tokens updated by another.

    Args:
        whole, lacking: of the same batch.
    """

    def __init__(self, whole: Attention, lacking: Attention):
        self._parts = whole, lacking
        self.summarize, self.update = whole.summarize, lacking.update
        self.any_summaries = whole.any_summaries

    def finalize(self) -> "LackingAttention":
        for part in self._parts:
            part.finalize()
        return self


def leave_out(part: str) -> None:
    """Make the attention of every model in this process lack `part`; all else reads the whole structure."""
    whole = MeloFormer.attention_for

    def attention_for(self, structure: Structure, name: str = "auto"):
        if self.config.dense:
            raise UserError("a dense model has no part to leave out")
        return LackingAttention(whole(self, structure, name), whole(self, PARTS[part](structure), name))

    MeloFormer.attention_for = attention_for


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    part = argv[0].replace("_", " ") if argv else None
    if part not in PARTS:
        names = " or ".join(name.replace(" ", "_") for name in PARTS)
        raise UserError(f"usage: python -m benchmarks.learning.ablation {names} OPTION ...")
    folder = Path(parse_args(argv[1:]).output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABLATION).write_text(json.dumps({"without": part}) + "\n", encoding="utf-8")
    leave_out(part)
    return train.main(argv[1:])


if __name__ == "__main__":
    cli.run(main)
