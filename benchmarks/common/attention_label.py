"""What an attention is called on the pages, where several are set side by side, and its colour."""

from collections.abc import Iterable

from meloformer.kernels.structure import KIND_RULE


def attention_label(run: dict) -> str:
    """`attention` of a run or a row, and its `kind_rule` unless it is the original one.

    What was measured before there was a choice does not tell its rule: it is that one.
    """
    kind_rule = run.get("kind_rule", KIND_RULE)
    return run["attention"] if kind_rule == KIND_RULE else f"{run['attention']}, {kind_rule}"


# Okabe and Ito's colours, told apart by the colour-blind; names that are not listed take what is left.
_COLOURS = {
    "triton": "#0072B2",
    "triton, next": "#009E73",
    "dense": "#E69F00",
    "flex": "#CC79A7",
}
_LEFT = ("#D55E00", "#56B4E9", "#999999", "#F0E442", "#000000")


def label_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in the order of the names."""
    left = iter(_LEFT)
    return {name: _COLOURS.get(name) or next(left) for name in names}
