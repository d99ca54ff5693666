"""Pieces of Markdown that the pages are made of."""

import re


def table(heads: list[str], lines: list[list[str]], left: int = 1) -> str:
    """The first `left` columns to the left, figures to the right."""
    if not lines:
        return "Nothing was measured.\n"
    aligned = ["---"] * left + ["---:"] * (len(heads) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, aligned, *lines])


def cell(value: float | None, form: str) -> str:
    """`form` as for str.format, or a dash."""
    return "-" if value is None else form.format(value)


def escape(text: str) -> str:
    """Text of others as a table cell or list item."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split()))
