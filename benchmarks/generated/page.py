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
    """In how many songs the drums and the bass play on, as a list."""
    lines = []
    for name, what in (("drums", "drums"), ("bass", "a bass")):
        counts = result["total"]["pooled"][name]
        if not counts["songs"]:
            lines.append(f"- No song has {what}.\n")
            continue
        songs = result["songs"].items()
        short = [
            f"{escape(song)} ({figures[name]:.0%}, from bar {figures[f'{name}_enter']} on "
            f"{figures[f'{name}_from_there']:.0%})"
            for song, figures in songs
            if figures[name] is not None and figures[name] < WANTED
        ]
        text = (
            f"- **{name.capitalize()}** in at least {WANTED:.0%} of the bars: {counts['enough']} of the "
            f"{counts['songs']} songs that have {what}"
        )
        text += f", not {', '.join(short)}" if short else ""
        text += f". {_pooled(counts)}."
        if result["real"] and (real := result["real"]["total"]["pooled"][name])["songs"]:
            text += f" Real songs: {real['enough']} of {real['songs']}. {_pooled(real)}."
        lines.append(f"{text}\n")
    return "".join(lines)


def _pooled(counts: dict) -> str:
    return (
        f"Counted from the first bar in which the part sounds: {counts['enough_from_there']} of {counts['songs']}. "
        f"Of all bars of these songs: {counts['sounding'] / counts['bars']:.0%}"
    )
