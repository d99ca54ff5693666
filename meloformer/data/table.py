"""The table that preprocess prints for a finished folder."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from ..midi.reader import MENDS, REASONS
from . import workers
from .shards import LEFT_OUT, ShardSet

ALL_REASONS = {
    **REASONS,
    **workers.REASONS,
    "duplicate": "an earlier file has the same tokens",
    "near_duplicate": "the song shares most of its bars with a song that is kept",
}


def print_table(songs: ShardSet, records: Iterable[dict]) -> None:
    """Print the table of a finished folder, from its manifest, indexes and completion records (`records`)."""
    totals, dropped, mends = Counter(), Counter(), Counter()
    for record in records:
        totals.update(files=record["files"], kept=record["kept"])
        dropped.update(record["dropped"])
        mends.update(record["mends"])
    doubles = songs.manifest["near_duplicates"]
    if doubles["left_out"]:
        dropped["near_duplicate"] = doubles["left_out"]
    _line("files", totals["files"])
    _line("kept", totals["kept"] - doubles["left_out"])
    _line("dropped", sum(dropped.values()))
    for reason, times in sorted(dropped.items(), key=lambda item: (-item[1], item[0])):
        _line(f"  {reason}", times, ALL_REASONS.get(reason, ""))
    if mends:
        _line("files mended with", "")
    for code, times in sorted(mends.items(), key=lambda item: (-item[1], item[0])):
        _line(f"  {code}", times, MENDS.get(code, ""))
    held = f"of near-duplicates, {doubles['songs']:,} songs, at most {doubles['largest_cluster']:,} in one"
    _line("clusters", doubles["clusters"], held if doubles["clusters"] else "of near-duplicates")
    _line("train songs", len(songs.split("train")))
    _line("val songs", len(songs.split("val")))
    used = songs.division != LEFT_OUT
    _line("tokens", int(songs.lengths[used].sum()))
    percentiles = (0, 5, 25, 50, 75, 95, 100)
    print(f"{'percentile':<16}" + "".join(f"{p:>9}" for p in percentiles))
    for name, values in (("tokens per song", songs.lengths[used]), ("bars per song", songs.bars[used])):
        print(f"{name:<16}" + "".join(f"{v:>9,.0f}" for v in np.percentile(values, percentiles)))


def _line(label: str, number: int | str, text: str = "") -> None:
    print(f"{label:<24}{number:>13,}  {text}".rstrip() if number != "" else label)
