"""The page of songs: a table of what each is made of, and the picture of their piano rolls."""

from benchmarks.common.machine import provenance
from benchmarks.common.markdown import cell, escape, table
from benchmarks.generated.statistics import MEANINGS, WANTED

HEADS = {
    "bars": ("bars", "{:.0f}"),
    "notes": ("notes", "{:,.0f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "drums": ("drums", "{:.0%}"),
    "bass": ("bass", "{:.0%}"),
    "band": ("band", "{:.0%}"),
    "chords": ("chords", "{:.0f}"),
    "repeated": ("repeated", "{:.0%}"),
    "notes_per_bar": ("notes a bar", "{:.1f}"),
}


def page(result: dict, picture: str, source: str) -> str:
    """The Markdown page of a result.

    Args:
        result: as `benchmarks.generated` writes it.
        picture, source: names of the picture and the JSON file beside the page.
    """
    songs = result["songs"]
    drawn = min(result["drawn"], len(songs))
    parts = [f"# {len(songs)} generated songs\n"]
    if result["made_by"]:
        parts.append(f"{escape(result['made_by'])}\n")
    parts.append(
        f"![Piano rolls of {drawn} songs, a row each, drums below the pitches]({picture})\n\n"
        f"The first {result['picture_bars']} bars of {_which(drawn, len(songs))}; colours are General MIDI "
        "families, darker is louder.\n"
    )
    parts.append(_songs_table(result))
    parts.append(_band_text(result))
    parts.append("".join(f"- **{HEADS[name][0]}**: {text}.\n" for name, text in MEANINGS.items()))
    parts.append(
        "A program that a band list names and that never plays is not in a MIDI file, so it is not counted.\n"
    )
    options = " --real FOLDER" if result["real"] else ""
    options += " --made_by TEXT" if result["made_by"] else ""
    parts.append(
        f"Made by `python -m benchmarks.generated FOLDER{options} --output PAGE.md` on "
        f"{provenance(result['machine'])}. Figures: [{source}]({source}).\n"
    )
    return "\n".join(parts)


def _which(drawn: int, songs: int) -> str:
    return "every song" if drawn == songs else f"the first {drawn} songs"


def _songs_table(result: dict) -> str:
    heads = ["song", "programs", "BPM", "metre", *(head for head, _ in HEADS.values())]
    lines = []
    for name, song in result["songs"].items():
        slow, fast = song["tempi"]
        bpm = f"{slow}" if slow == fast else f"{slow} to {fast}"
        described = [escape(name), ", ".join(song["programs"]), bpm, ", ".join(song["metres"])]
        lines.append([*described, *_figures(song)])
    lines.append(["**median**", "", "", "", *_figures(result["total"]["medians"])])
    if real := result["real"]:
        label = f"median of {real['total']['songs']} real songs, first {real['most_bars']} bars"
        lines.append([label, "", "", "", *_figures(real["total"]["medians"])])
    return table(heads, lines, left=4)


def _figures(song: dict) -> list[str]:
    return [cell(song[name], form) for name, (_, form) in HEADS.items()]


def _band_text(result: dict) -> str:
    """In how many songs the drums and the bass play on, and which songs are short of it."""
    totals = [("generated", result["total"])]
    if result["real"]:
        totals.append(("real", result["real"]["total"]))
    heads = [
        "part",
        "songs that have it",
        f"in {WANTED:.0%} of the bars or more",
        "the same, counted from the bar in which it enters",
        "share of all their bars",
    ]
    lines, short = [], []
    for name in ("drums", "bass"):
        for label, figures in totals:
            counts = figures["pooled"][name]
            share = counts["sounding"] / counts["bars"] if counts["bars"] else None
            numbers = [str(counts[key]) for key in ("songs", "enough", "enough_from_there")]
            lines.append([f"{name}, {label}", *numbers, cell(share, "{:.0%}")])
        short += [
            f"- {escape(song)}: {name} in {figures[name]:.0%}; from bar {figures[f'{name}_enter']} on, where "
            f"{'they enter' if name == 'drums' else 'it enters'}, in {figures[f'{name}_from_there']:.0%}\n"
            for song, figures in result["songs"].items()
            if figures[name] is not None and figures[name] < WANTED
        ]
    text = table(heads, lines)
    if short:
        text += f"\nGenerated songs with fewer than {WANTED:.0%} of the bars:\n\n" + "".join(short)
    return text
