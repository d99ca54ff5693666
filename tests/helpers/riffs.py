"""Songs in which instruments play the same bar again and again."""

from meloformer.tokens import vocab

DRUMS = "INST_drums T_0 P_36 L_24 V_20 P_42 T_24 P_38 P_42"
RIFF = "INST_0 T_0 P_60 L_24 V_20 T_24 P_64 P_67"
OTHER = "INST_0 T_0 P_60 L_24 V_20 T_24 P_65 L_12 P_69"


def riffs(bars: int) -> list[int]:
    """Token ids of a song, without EOS: drums and a piano, which plays something else in every third bar."""
    names = ["BOS", "BAND_drums", "BAND_0"]
    for bar in range(bars):
        names += ["CHORD_N"] if bar else ["CHORD_N", "TS_4/4", "BPM_120"]
        names += [*DRUMS.split(), *(OTHER if bar % 3 == 2 else RIFF).split()]
    return [vocab.ids_by_name()[name] for name in names]


def begun(tokens: int) -> list[int]:
    """The next bar's beginning, with so many of the drums' tokens."""
    return [vocab.ids_by_name()[name] for name in ("CHORD_N", *DRUMS.split()[:tokens])]


def notes(ids: list[int]) -> list[str]:
    """By name what says when and how high notes are."""
    return [vocab.names()[token] for token in ids if token in vocab.T or token in vocab.P]
