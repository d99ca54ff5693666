"""Label and colour of an attention, with its rule, on pages and charts that compare several."""

from collections.abc import Iterable

from meloformer.model.transformer import DENSE

# The only rule until there was a choice; results from then do not name it.
ORIGINAL_RULE = {"kind_rule": "alike", "near_bars": "0,1,2,4"}


def attention_label(run: dict) -> str:
    """`attention` of a run or a row, `kind_rule` and `near_bars` unless they are the original ones, and the
    part that its attention lacked, if `without` names one."""
    label = run["attention"]
    if label != DENSE:
        kind_rule, near_bars = (run.get(name, original) for name, original in ORIGINAL_RULE.items())
        if kind_rule != ORIGINAL_RULE["kind_rule"]:
            label += f", {kind_rule}"
        if near_bars != ORIGINAL_RULE["near_bars"]:
            label += f", near {near_bars.replace(',', ' ')}"
    if run.get("without"):
        label += f", no {run['without']}"
    return label


# The palette of Okabe and Ito, safe for colour-blind readers; other labels take a colour of `_LEFT`.
_COLOURS = {
    "triton": "#0072B2",
    "triton, next": "#009E73",
    "triton, any, near 0 1": "#009E73",
    "dense": "#E69F00",
    "flex": "#CC79A7",
}
_LEFT = ("#D55E00", "#56B4E9", "#999999", "#F0E442", "#000000")


def label_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each label, in the order given."""
    left = iter(_LEFT)
    return {name: _COLOURS.get(name) or next(left) for name in names}
