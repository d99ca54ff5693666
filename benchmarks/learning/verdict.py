"""Which of two attentions learned better, and where: sentences from figures alone."""

from collections.abc import Callable, Sequence

from benchmarks.common.attention_label import attention_label
from benchmarks.learning.curves import Curve, first_reached, lowest_until, shared_stretch, stretches

_MOST_STRETCHES = 4


def of_run(run: dict, axis: str) -> Curve:
    """Validation loss by "tokens", "seconds" or "all_seconds"."""
    return run["validation"][axis], run["validation"]["val_loss"]


def best(run: dict) -> int:
    """Which validation of a run has the lowest loss."""
    losses = run["validation"]["val_loss"]
    return losses.index(min(losses))


def kinds_of(runs: list[dict]) -> list[str]:
    """The kinds of token that all runs have losses of."""
    prefix = "val_loss_"
    found = [key for key in runs[0]["validation"] if key.startswith(prefix)]
    return [key.removeprefix(prefix) for key in found if all(key in run["validation"] for run in runs)]


def hardest_shared_loss(runs: list[dict]) -> float:
    """The lowest loss that all runs reach."""
    return max(min(run["validation"]["val_loss"]) for run in runs)


def groups(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs by the name of their attention."""
    found: dict[str, list[dict]] = {}
    for run in runs:
        found.setdefault(attention_label(run), []).append(run)
    return found


def lower(values: dict[str, Sequence[float]]) -> tuple[str | None, str]:
    """Which of two names has the lower losses (nats per token, one for each seed), and a sentence on it.

    It is None, no clear difference, if the ranges of their seeds meet.
    """
    means = {name: sum(found) / len(found) for name, found in values.items()}
    lead, trail = sorted(means, key=means.__getitem__)
    spread = max(max(found) - min(found) for found in values.values())
    gap = means[trail] - means[lead]
    figures = (
        f"{means[lead]:.4f} nats per token with `{lead}` and {means[trail]:.4f} with `{trail}`, "
        f"{gap:.4f} or {gap / means[trail]:.1%} apart"
    )
    seeds = max(map(len, values.values()))
    if max(values[lead]) >= min(values[trail]):
        why = f"; the ranges of their seeds, up to {spread:.4f} wide, overlap" if seeds > 1 else ""
        return None, f"no clear difference: {figures}{why}"
    if seeds == 1:
        why = "; one seed each, so how much of that is chance is not known"
    else:
        why = (
            f" on average; every seed of `{lead}` is below every one of `{trail}`, and seeds of one kind are "
            f"{spread:.4f} apart at most"
        )
    return lead, f"`{lead}` is lower: {figures}{why}"


def verdict(one: list[dict], other: list[dict]) -> list[str]:
    """Sentences on two lists of runs, each of one attention."""
    both = {attention_label(runs[0]): runs for runs in (one, other)}
    return [
        f"**Speed:** {_speed(both)}.",
        f"**At equal tokens:** {_until_the_end(both, 'tokens', _millions)}.",
        f"**Along the tokens:** {_where(both, 'tokens', _millions)}.",
        f"**At equal time:** {_until_the_end(both, 'seconds', _seconds)}.",
        f"**Along the time:** {_where(both, 'seconds', _seconds)}.",
        f"**At equal time, slow steps included:** {_until_the_end(both, 'all_seconds', _seconds)}.",
        f"**To the lowest loss that all reach:** {_reaching(both)}.",
        f"**By kind of token:** {_kinds(both)}.",
    ]


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.2f}M tokens"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _speed(both: dict[str, list[dict]]) -> str:
    rates = {name: _mean([run["tokens_per_s"] for run in runs]) for name, runs in both.items()}
    slow, fast = sorted(rates, key=rates.__getitem__)
    return (
        f"`{fast}` trains {rates[fast] / rates[slow]:.2f} times as fast as `{slow}`, {rates[fast]:,.0f} "
        f"against {rates[slow]:,.0f} tokens/s"
    )


def _until_the_end(both: dict[str, list[dict]], axis: str, told: Callable[[float], str]) -> str:
    """The lowest losses up to where the shortest run ends."""
    start, end = shared_stretch([of_run(run, axis) for runs in both.values() for run in runs])
    if start > end:
        return f"no verdict: a run is through after {told(end)}, before another is first validated"
    values = {name: [lowest_until(of_run(run, axis), end) for run in runs] for name, runs in both.items()}
    return f"within {told(end)}, by the lowest loss so far, {lower(values)[1]}"


def _where(both: dict[str, list[dict]], axis: str, told: Callable[[float], str]) -> str:
    """Where which curve is below."""
    names, curves = list(both), [[of_run(run, axis) for run in runs] for runs in both.values()]
    found = stretches(*curves)
    if not found:
        return "the curves have no stretch in common"
    mean = ", by the mean of the seeds" if max(map(len, curves)) > 1 else ""
    if len(found) > _MOST_STRETCHES:
        return (
            f"the curves cross {len(found) - 1} times between {told(found[0][1])} and "
            f"{told(found[-1][2])}{mean}; at the end that of `{names[found[-1][0]]}` is below"
        )
    parts = [
        f"`{names[which]}` "
        + (f"at {told(first)}" if first == last else f"from {told(first)} to {told(last)}")
        for which, first, last in found
    ]
    return f"the curve below is that of {', '.join(parts)}{mean}"


def _reaching(both: dict[str, list[dict]]) -> str:
    target = hardest_shared_loss([run for runs in both.values() for run in runs])
    needed = {
        name: {
            axis: _mean([first_reached(of_run(run, axis), target) for run in runs])
            for axis in ("tokens", "seconds")
        }
        for name, runs in both.items()
    }
    quick, late = sorted(needed, key=lambda name: needed[name]["seconds"])
    texts = [
        f"`{name}` takes {_seconds(n['seconds'])} and {_millions(n['tokens'])}" for name, n in needed.items()
    ]
    ratios = {axis: needed[late][axis] / needed[quick][axis] for axis in ("seconds", "tokens")}
    return (
        f"to {target:.4f} nats per token {', '.join(texts)}; `{late}` takes {ratios['seconds']:.2f} times as "
        f"long as `{quick}` and {ratios['tokens']:.2f} times as many tokens"
    )


def _kinds(both: dict[str, list[dict]]) -> str:
    """Each run at its best point."""
    leads: dict[str | None, list[str]] = {}
    for kind in kinds_of([run for runs in both.values() for run in runs]):
        values = {
            name: [run["validation"][f"val_loss_{kind}"][best(run)] for run in runs]
            for name, runs in both.items()
        }
        leads.setdefault(lower(values)[0], []).append(kind)
    texts = [f"`{name}` is lower on {', '.join(leads[name])}" for name in both if name in leads]
    if None in leads:
        texts.append(f"no clear difference on {', '.join(leads[None])}")
    return "each run at its best point, " + "; ".join(texts)
