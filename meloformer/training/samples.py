"""A song generated during training, as MIDI file and piano roll."""

from collections.abc import Callable
from pathlib import Path

from ..generation.draft import Draft
from ..generation.loop import write
from ..generation.sampling import Sampling
from ..midi.writer import write_midi
from ..model.transformer import MeloFormer
from ..plots.piano_roll import piano_roll
from ..tokens import vocab
from ..tokens.tokenizer import HIDTokenizer

BARS, MAX_TOKENS = 16, 1024
SAMPLING = Sampling(temperature=1.0, top_p=0.95)
SEED = 0  # the same for all samples of a run, so that only the weights differ


def write_sample(
    model: MeloFormer, folder: Path, step: int, *, max_context: int, attention: str, stops: Callable[[], bool]
) -> bool:
    """Write `folder/step-<step>.mid` and `.png`.

    Args:
        model: its training or evaluation mode is restored afterwards.
        max_context: the largest number of tokens that the model attends to.
        stops: called after each token; whether to stop generating.

    Returns:
        False if generation was stopped; nothing is written then.
    """

    was_training = model.training
    model.eval()
    try:
        draft = Draft(bars=BARS, max_tokens=MAX_TOKENS, sampling=SAMPLING, seed=SEED)
        for _ in write(model, [draft], max_context, attention):
            if stops():
                return False
    finally:
        model.train(was_training)
    ids = draft.song()
    if not vocab.P.mask(ids).any():
        print(f"the sample of step {step} has no note")
        return True
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.mid"
    midi = HIDTokenizer().decode(ids)
    write_midi(midi, path)
    piano_roll(midi, path.with_suffix(".png"), f"Step {step:,}")
    return True
