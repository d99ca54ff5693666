"""What an attention is called on the pages, where several are set side by side."""

from meloformer.kernels.structure import KIND_RULE


def attention_name(run: dict) -> str:
    """`attention` of a run or a row, and its `kind_rule` unless it is the original one.

    What was measured before there was a choice does not tell its rule: it is that one.
    """
    kind_rule = run.get("kind_rule", KIND_RULE)
    return run["attention"] if kind_rule == KIND_RULE else f"{run['attention']}, {kind_rule}"
