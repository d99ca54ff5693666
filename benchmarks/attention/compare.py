"""Two results of `benchmarks.report` side by side: what changed, and whether beyond the noise."""

from collections.abc import Iterator

from benchmarks.attention.metrics import LABELS, PASSES, columns_of, measured
from benchmarks.attention.results import row_key
from benchmarks.common.machine import provenance
from meloformer.errors import UserError


def compare(old: dict, new: dict) -> str:
    """A Markdown page of old, new, ratio and whether they differ beyond noise.

    Times differ beyond noise if the ranges from their 20th to their 80th percentiles do not overlap.

    Raises:
        UserError: the shapes differ, or they share no row.
    """
    if old["settings"] != new["settings"]:
        raise UserError(
            f"settings differ: {old['settings']} and {new['settings']}: there is nothing to compare"
        )
    before = {row_key(row): row for row in old["rows"]}
    after = {row_key(row): row for row in new["rows"]}
    shared = [key for key in before if key in after]
    if not shared:
        raise UserError("the results share no row (a row is its name and its length)")
    text = (
        f"# What a change did\n\n- old: {provenance(old['machine'])}\n- new: {provenance(new['machine'])}\n"
    )
    if old["machine"]["gpu"] != new["machine"]["gpu"]:
        text += "\n**The GPUs differ: so may everything else.**\n"
    text += "\n| row | column | what | old | new | new / old | |\n|---|---|---|---:|---:|---:|---|\n"
    for key in shared:
        for column in columns_of([before[key], after[key]]):
            for cells in _lines(before[key], after[key], column):
                name = key[0].replace("|", "\\|")
                text += f"| {name} | {LABELS[column]} | {' | '.join(cells)} |\n"
    for label, here, there in (("old", before, after), ("new", after, before)):
        alone = [f"{name} ({tokens:,} tokens)" for name, tokens in here if (name, tokens) not in there]
        if alone:
            text += f"\nOnly in {label}: {', '.join(alone)}.\n"
    return text + (
        "\nMilliseconds are medians; *faster* and *slower* mean that the ranges from the 20th to the 80th "
        "percentile do not overlap.\n"
    )


def _lines(old: dict, new: dict, column: str) -> Iterator[list[str]]:
    before, after = measured(old, column), measured(new, column)
    if before is None or after is None:
        if before or after:
            yield ["all", _state(old, column), _state(new, column), "", "**changed**"]
        return
    for phase in ("update", "summarize"):
        if phase in before and phase in after:
            for which in PASSES:
                yield _times(f"{phase} {which}, ms", before[phase][which], after[phase][which])
    if "plan" in before and "plan" in after:
        yield _times("plan on the GPU, ms", before["plan"], after["plan"])
        yield _amounts("plan, wall, ms", before["plan"]["wall_ms"], after["plan"]["wall_ms"])
    if before["update"]["extra_mb"] and after["update"]["extra_mb"]:
        yield _amounts("extra memory, MB", before["update"]["extra_mb"], after["update"]["extra_mb"])
    errors = [max(entry["errors"].values()) for entry in (before, after)]
    yield _amounts("worst error, x", *errors)


def _state(row: dict, column: str) -> str:
    """Why a column has no figures, or that it has."""
    entry = row["columns"].get(column)
    if entry is None:
        return "not asked for"
    why = next((f"{why}: {entry[why]}" for why in ("failed", "skipped") if why in entry), "measured")
    return why.replace("|", "\\|")


def _times(what: str, old: dict, new: dict) -> list[str]:
    flag = ""
    if new["p80"] < old["p20"]:
        flag = "faster"
    elif new["p20"] > old["p80"]:
        flag = "**slower**"
    return [*_amounts(what, old["ms"], new["ms"])[:-1], flag]


def _amounts(what: str, old: float, new: float) -> list[str]:
    ratio = f"{new / old:.3f}" if old else "-"
    return [what, f"{old:.4g}", f"{new:.4g}", ratio, ""]
