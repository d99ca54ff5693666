"""General MIDI: names of the 128 programs, and groups of the drum keys."""

_FAMILIES = """
Grand Piano, Bright Piano, Electric Grand, Honky-tonk Piano, Electric Piano 1, Electric Piano 2, Harpsichord, Clavinet
Celesta, Glockenspiel, Music Box, Vibraphone, Marimba, Xylophone, Tubular Bells, Dulcimer
Drawbar Organ, Percussive Organ, Rock Organ, Church Organ, Reed Organ, Accordion, Harmonica, Bandoneon
Nylon Guitar, Steel Guitar, Jazz Guitar, Clean Guitar, Muted Guitar, Overdriven Guitar, Distorted Guitar, Guitar Harmonics
Acoustic Bass, Fingered Bass, Picked Bass, Fretless Bass, Slap Bass 1, Slap Bass 2, Synth Bass 1, Synth Bass 2
Violin, Viola, Cello, Contrabass, Tremolo Strings, Pizzicato Strings, Harp, Timpani
Strings 1, Strings 2, Synth Strings 1, Synth Strings 2, Choir Aahs, Voice Oohs, Synth Voice, Orchestra Hit
Trumpet, Trombone, Tuba, Muted Trumpet, French Horn, Brass Section, Synth Brass 1, Synth Brass 2
Soprano Sax, Alto Sax, Tenor Sax, Baritone Sax, Oboe, English Horn, Bassoon, Clarinet
Piccolo, Flute, Recorder, Pan Flute, Blown Bottle, Shakuhachi, Whistle, Ocarina
Square Lead, Sawtooth Lead, Calliope Lead, Chiff Lead, Charang Lead, Voice Lead, Fifths Lead, Bass + Lead
New Age Pad, Warm Pad, Polysynth Pad, Choir Pad, Bowed Pad, Metallic Pad, Halo Pad, Sweep Pad
Rain FX, Soundtrack FX, Crystal FX, Atmosphere FX, Brightness FX, Goblins FX, Echoes FX, Sci-fi FX
Sitar, Banjo, Shamisen, Koto, Kalimba, Bagpipe, Fiddle, Shanai
Tinkle Bell, Agogo, Steel Drums, Woodblock, Taiko, Melodic Tom, Synth Drum, Reverse Cymbal
Fret Noise, Breath Noise, Seashore, Bird Tweet, Telephone, Helicopter, Applause, Gunshot
"""  # noqa: E501

# Each has eight programs.
FAMILY_NAMES = (
    "Piano", "Tuned percussion", "Organ", "Guitar", "Bass", "Strings", "Ensemble", "Brass", "Reed", "Pipe",
    "Synth lead", "Synth pad", "Synth effects", "Ethnic", "Percussive", "Sound effects",
)  # fmt: skip

PROGRAM_NAMES = tuple(name for family in _FAMILIES.split("\n")[1:-1] for name in family.split(", "))

# Keys of each part of the drum kit, in plots from the bottom up; "other" stands for all remaining keys.
DRUM_GROUPS: dict[str, frozenset[int]] = {
    "kick": frozenset({35, 36}),
    "snare": frozenset({37, 38, 39, 40}),
    "toms": frozenset({41, 43, 45, 47, 48, 50}),
    "hi-hat": frozenset({42, 44, 46}),
    "cymbals": frozenset({49, 51, 52, 53, 55, 57, 59}),
    "other": frozenset(),
}


def instrument_name(instrument: int) -> str:
    """The name of a program 0..127, or of the drums, whose number follows."""
    return PROGRAM_NAMES[instrument] if instrument < len(PROGRAM_NAMES) else "Drums"
