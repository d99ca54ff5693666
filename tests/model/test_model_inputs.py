"""Input features and chord guesses against a reader that goes token by token, and what they may not depend
on."""

import numpy as np
import pytest
import torch

from meloformer.kernels.structure import Structure
from meloformer.model import inputs
from meloformer.model.inputs import BAR_ENDS, TABLE_SIZES, ChordGuesses, InputFeatures, read_context
from meloformer.tokens import attributes, vocab
from meloformer.tokens.vocab import CHORD, INST, L, P, T, V


def packed(documents: list[np.ndarray], padding: int = 0):
    """ids [1, N] and the structure of documents in one row."""
    row = np.concatenate(documents)
    lengths = [len(document) for document in documents]
    scanned = attributes.scan(row, starts=np.cumsum(lengths) - lengths)
    doc = np.repeat(np.arange(len(documents)), lengths)

    def tensor(values, fill):
        return torch.from_numpy(np.pad(values.astype(np.int64), (0, padding), constant_values=fill))[None]

    fields = [scanned.bar, scanned.inst, scanned.kind, scanned.onset]
    return tensor(row, vocab.PAD), Structure.build(tensor(doc, -1), *(tensor(field, 0) for field in fields))


NAMES = InputFeatures._fields + ChordGuesses._fields
SIZES = [*TABLE_SIZES, *(vocab.VOCAB_SIZE for _ in ChordGuesses._fields)]


def context_of(ids, structure) -> list[torch.Tensor]:
    features, guesses = read_context(ids, structure)
    return [*features, *guesses]


def read_token_by_token(ids: np.ndarray) -> np.ndarray:
    """The context of one document, [names, n], with what a musician would keep in mind: dictionaries."""
    rows, seen, followers, last_of_family = [], {}, {}, {}
    force, head, inst = {}, None, vocab.NO_INSTRUMENT
    chords, after = [], {}
    pending = None  # the place of the token before this one
    for token in ids.tolist():
        family = vocab.family_of(token)
        if pending is not None:
            seen[pending] = token
        if family in (INST, CHORD):
            rank = token - INST.start + 1 if family is INST else 0
            if head is not None:
                followers[head] = rank or BAR_ENDS
            head = rank
        if family is CHORD:
            for length in (1, 2):
                after[tuple(chords[-length:]), length] = token
            chords.append(token)
            last_of_family.pop("INST", None)
        if family not in (T, P, L, V):
            force = {}
            for name in "TPLV":
                last_of_family.pop(name, None)
            inst = vocab.INSTRUMENTS[token - INST.start] if family is INST else vocab.NO_INSTRUMENT
        elif family is not P:
            force[family.name] = token - family.start + 1
        previous = last_of_family.get(family.name, 0)
        if family.name not in ("PAD", "BOS", "EOS"):
            last_of_family[family.name] = token
        pending = (inst, force.get("T", 0), token)
        rows.append(
            (
                *(force.get(name, 0) for name in "TLV"),
                chords[-1] - CHORD.start + 1 if chords else 0,
                previous,
                seen.get(pending, 0),
                followers.get(head, 0) if head is not None else 0,
                *(chords[-bars] if len(chords) >= bars else 0 for bars in (1, 2, 4, 8)),
                *(after.get((tuple(chords[-length:]), length), 0) if chords else 0 for length in (1, 2)),
            )
        )
    return np.array(rows).T


def test_features_are_what_a_reader_notes(songs):
    documents = songs[:6]
    context = context_of(*packed(documents, padding=7))
    start = 0
    for document in documents:
        expected = read_token_by_token(document)
        for name, got, want in zip(NAMES, context, expected):
            np.testing.assert_array_equal(got[0, start : start + len(document)].numpy(), want, name)
        start += len(document)
    for name, values, size in zip(NAMES, context, SIZES):
        assert values.min() >= 0 and values.max() < size, name
        assert values.unique().numel() > 3, name  # it says something in these songs


def test_features_do_not_depend_on_later_tokens(songs):
    ids = songs[3]
    whole = context_of(*packed([ids]))
    for length in (1, 2, 17, len(ids) // 2, len(ids) - 1):
        prefix = context_of(*packed([ids[:length]]))
        for name, part, full in zip(NAMES, prefix, whole):
            assert torch.equal(part, full[:, :length]), (name, length)


@pytest.mark.parametrize("seed", range(3))
def test_any_ids_give_indices_of_the_tables(seed):
    """Ids that follow no grammar, with a structure that does not belong to them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab.VOCAB_SIZE, (2, 400), generator=generator)
    doc = torch.tensor([[0] * 150 + [1] * 250, [0] * 390 + [-1] * 10])
    zeros = torch.zeros_like(ids)
    inst = torch.randint(0, 130, ids.shape, generator=generator)
    structure = Structure.build(doc, zeros, inst, zeros, zeros)
    for name, values, size in zip(NAMES, context_of(ids, structure), SIZES):
        assert values.shape == ids.shape and values.min() >= 0 and values.max() < size, name


@pytest.mark.parametrize("seed", range(4))
def test_documents_of_any_ids_do_not_know_of_each_other(seed):
    """Many in a row, some of them alike, that begin and end anywhere and are numbered as one likes. Each says
    the same as alone. Few ids, so that the same ones come again."""
    random = np.random.default_rng(seed)
    some = random.choice(vocab.VOCAB_SIZE, 12, replace=False)
    heads = [CHORD.start, CHORD.start + 1, INST.start, INST.start + 3, INST.stop - 1]
    ids_of = np.concatenate([some, heads, [T.start + 3, P.start + 60, L.start + 5, V.start + 9]])
    length, rows, numbers = 90, [], []
    for _ in range(3):
        cuts = np.sort(random.choice(np.arange(4, length), 8, replace=False))
        alike = random.choice(ids_of, length)
        row = [
            random.choice([alike[:n], random.choice(ids_of, n)])
            for n in np.diff(cuts, prepend=3, append=length)
        ]
        row = [np.array([INST.stop - 1]), np.array([CHORD.start, INST.start]), *row]
        rows.append(row)
        numbers.append(
            np.repeat(np.sort(random.choice(500, len(row), replace=False)), [len(part) for part in row])
        )
    inst = random.choice([0, 33, 128, vocab.NO_INSTRUMENT], length)

    def context(documents, doc, inst):
        ids = torch.from_numpy(np.stack([np.concatenate(row) for row in documents]))
        zeros, of_ids = torch.zeros_like(ids), torch.from_numpy(np.broadcast_to(inst, ids.shape).copy())
        structure = Structure.build(torch.from_numpy(doc), zeros, of_ids, zeros, zeros, num_summaries=length)
        return torch.stack(context_of(ids, structure))

    together = context(rows, np.stack(numbers), inst)
    for number, row in enumerate(rows):
        start = 0
        for document in row:
            part = slice(start, start + len(document))
            alone = context([[document]], np.zeros((1, len(document)), np.int64), inst[part])
            assert torch.equal(together[:, number, part], alone[:, 0])
            start += len(document)


def test_keys_are_as_large_as_they_may_be():
    """Those of places in a batch of 2^28 tokens."""
    largest = 2**28 * (vocab.NO_INSTRUMENT + 1) * (len(T) + 1) * vocab.VOCAB_SIZE
    assert largest < 1 << (inputs._KEY_BITS - 1) and 3 << inputs._KEY_BITS < 2**62


def test_what_repeats_is_foreseen():
    """A bar played twice: from its second token on, `repeat` names the next token."""
    bar = [INST.start + 3, T.start, P.start + 60, L.start + 5, V.start + 9, T.start + 24, P.start + 62]
    ids = np.array([vocab.BOS, CHORD.start, vocab.TS.start, vocab.BPM.start, *bar, CHORD.start + 1, *bar])
    features, _ = read_context(*packed([ids]))
    second = slice(len(ids) - len(bar), len(ids) - 1)
    np.testing.assert_array_equal(features.repeat[0, second].numpy(), ids[len(ids) - len(bar) + 1 :])
    assert features.next_instrument[0, -1] == BAR_ENDS


def test_chords_that_return_are_guessed():
    """Bars under the labels a b c a b: after the last one the song went on with c."""
    a, b, c = range(CHORD.start, CHORD.start + 3)
    ids = np.array([vocab.BOS, a, b, c, a, b, INST.start, T.start])
    _, guesses = read_context(*packed([ids]))
    assert [int(guess[0, -1]) for guess in guesses] == [b, a, b, 0, c, c]
    assert [int(guess[0, 4]) for guess in guesses] == [a, c, a, 0, b, 0]  # c a was never heard before
    assert not any(guess[0, 0] for guess in guesses)
