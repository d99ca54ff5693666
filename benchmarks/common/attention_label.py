"""Label and colour of an attention, with its kind rule, on pages and charts that compare several."""

from collections.abc import Iterable

ORIGINAL_RULE = "alike"  # the only kind rule until there was a choice; results from then do not name it


def attention_label(run: dict) -> str:
    """`attention` of a run or a row, and its `kind_rule` unless that is the original one."""
    kind_rule = run.get("kind_rule", ORIGINAL_RULE)
    return run["attention"] if kind_rule == ORIGINAL_RULE else f"{run['attention']}, {kind_rule}"


# The palette of Okabe and Ito, safe for colour-blind readers; other labels take a colour of `_LEFT`.
_COLOURS = {
    "triton": "#0072B2",
    "triton, next": "#009E73",
    "dense": "#E69F00",
    "flex": "#CC79A7",
}
_LEFT = ("#D55E00", "#56B4E9", "#999999", "#F0E442", "#000000")


def label_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each label, in the order given."""
    left = iter(_LEFT)
    return {name: _COLOURS.get(name) or next(left) for name in names}
