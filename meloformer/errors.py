"""What can go wrong through no fault of the code."""


class UserError(Exception):
    """A mistake a user can mend: the message is one line, and the command exits with `exit_code`."""

    exit_code = 2


class DivergedError(UserError):
    """Training that has gone beyond what finite numbers can tell."""

    exit_code = 3


class MidiError(UserError):
    """A MIDI file that cannot become a song.

    Attributes:
        reason: a short code from `meloformer.midi.reader.REASONS`, for tables and `failed.tsv`.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):  # crosses process borders: args hold the joined message, not both parts
        return type(self), (self.reason, self.detail)
