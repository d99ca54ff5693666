"""Errors that are not bugs: invalid input, missing files, lack of memory, diverged training."""


class UserError(Exception):
    """An error that the user can fix: its message is one line, and the command exits with `exit_code`."""

    exit_code = 2


class DivergedError(UserError):
    """Training whose loss, gradients or weights are no longer finite."""

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
