import mido
import numpy as np
import pytest
import torch

from benchmarks.fidelity import notes_by_key
from meloformer import generate as module
from meloformer.checkpoint.store import save_checkpoint
from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.generation.sampling import Sampling, Wishes, context, generate
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import attributes, grammar, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

TOKENIZER = HIDTokenizer()
CONFIG = ModelConfig(layers=1, dim=32, heads=2, ffn=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MeloFormer(CONFIG).eval()


def bars_of(ids):
    return int(vocab.CHORD.mask(ids).sum())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_an_untrained_model_says_is_a_song(model, seed):
    ids = generate(model, bars=3, max_tokens=300, seed=seed)
    grammar.check(ids)
    assert ids[0] == vocab.BOS and ids[-1] == vocab.EOS
    assert notes_by_key(TOKENIZER.decode(ids))


def test_the_same_seed_gives_the_same_song(model):
    first, again, other = (generate(model, bars=2, max_tokens=120, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_as_many_bars_as_asked_for(model):
    sampling = Sampling(temperature=3.0)  # an untrained model must be shaken to end its bars
    for bars in (1, 2, 5):
        ids = generate(model, bars=bars, max_tokens=5000, sampling=sampling)
        assert len(attributes.cut_points(ids)) == bars


def test_the_last_token_allowed_ends_the_song_at_a_complete_note(model):
    for limit in range(20, 40):
        ids = generate(model, bars=50, max_tokens=limit)
        grammar.check(ids)
        assert len(ids) <= limit + 2 and ids[-1] == vocab.EOS


def test_a_continued_song_keeps_its_beginning(model):
    prompt = TOKENIZER.encode(compose(1, bars=3))
    ids = generate(model, prompt, bars=2, max_tokens=400)
    np.testing.assert_array_equal(ids[: len(prompt) - 1], prompt[:-1])
    assert bars_of(ids) > bars_of(prompt) and ids[len(prompt) - 1] in vocab.CHORD
    grammar.check(ids)


@pytest.mark.parametrize("prompt_seed", [None, 1, 2])
def test_wishes_are_kept_from_the_first_new_bar(model, prompt_seed):
    prompt = None if prompt_seed is None else TOKENIZER.encode(compose(prompt_seed, bars=3))
    wishes = Wishes(signature=vocab.SIGNATURE_INDEX[5, 8], bpm=77, instruments=(33, vocab.DRUMS))
    ids = generate(model, prompt, bars=3, max_tokens=500, wishes=wishes, sampling=Sampling(temperature=2.0))
    new = ids[0 if prompt is None else len(prompt) - 1 :]
    names = [vocab.names()[token] for token in new]
    start = names.index("TS_5/8")
    assert names[start - 1].startswith("CHORD") and "BPM_77" in names[start : start + 2]
    assert [name for name in names if name.startswith(("TS", "CUT"))] == ["TS_5/8"]
    assert [name for name in names if name.startswith("BPM")] == ["BPM_77"]
    assert {name for name in names if name.startswith("INST")} <= {"INST_33", "INST_drums"}


def test_bars_in_parts_are_counted_whole_and_not_broken_by_a_wish(model):
    wishes = Wishes(signature=vocab.SIGNATURE_INDEX[20, 4])
    ids = generate(model, bars=2, max_tokens=5000, wishes=wishes, sampling=Sampling(temperature=3.0))
    assert vocab.TS.mask(ids).sum() == 1
    assert bars_of(ids) == 2 * 3 and len(attributes.cut_points(ids)) == 2


def test_greedy_takes_the_likeliest_token():
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert Sampling(temperature=0).pick(logits, torch.Generator()) == 1
    assert Sampling(temperature=1e-45).pick(logits, torch.Generator()) == 1


@pytest.mark.parametrize(
    "sampling, possible",
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {2, 3}),
        (Sampling(top_p=0.6), {3}),
        (Sampling(top_p=0.7), {2, 3}),
        (Sampling(top_k=1, top_p=0.9), {3}),
        (Sampling(temperature=100.0), {0, 1, 2, 3}),
    ],
    ids=["all", "top-k", "top-p of one", "top-p of two", "both", "hot"],
)
def test_draws_come_from_the_tokens_that_stay(sampling, possible):
    logits = torch.log(torch.tensor([0.05, 0.1, 0.2, 0.65, 0.0]))
    generator = torch.Generator().manual_seed(0)
    assert {sampling.pick(logits.clone(), generator) for _ in range(400)} == possible


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7]))
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount([Sampling().pick(logits, generator) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, [0.1, 0.2, 0.7], atol=0.03)


def test_a_long_past_is_left_out_at_a_bar_line():
    ids = TOKENIZER.encode(compose(2, bars=60))[:-1]
    kept = context(ids, 600)
    longest_bar = np.diff(attributes.cut_points(ids)).max()
    assert 600 - longest_bar - 4 <= len(kept) <= 600
    grammar.check(kept)
    assert kept[0] in vocab.CHORD and kept[1] in vocab.TS
    np.testing.assert_array_equal(kept[-90:], ids[-90:])
    assert context(ids, len(ids)) is ids


def test_a_song_longer_than_the_context_goes_on(model):
    prompt = TOKENIZER.encode(compose(2, bars=60))
    ids = generate(model, prompt, bars=2, max_tokens=60, max_context=600)
    grammar.check(ids)
    assert len(ids) > len(prompt)


def test_a_bar_that_outgrows_the_context_ends_the_song(model):
    prompt = TOKENIZER.encode(compose(1, bars=4))
    ids = generate(model, prompt, bars=50, max_tokens=500, max_context=10)
    grammar.check(ids)
    np.testing.assert_array_equal(ids[: len(prompt) - 1], prompt[:-1])
    assert len(ids) < len(prompt) + 60


@pytest.mark.parametrize(
    "flag", ["--temperature=nan", "--temperature=-1", "--top_p=0", "--tempo=5", "--seed=-1"]
)
def test_numbers_out_of_range_end_in_one_line(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--checkpoint", "c", "--output", "x.mid", flag])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "text, expected",
    [("0, 33", (0, 33)), ("drums", (128,)), ("Flute,Grand Piano , flute", (0, 73))],
)
def test_instruments_by_number_and_name(text, expected):
    assert module.parse_instruments(text) == expected


@pytest.fixture
def checkpoint(model, tmp_path):
    from dataclasses import asdict

    save_checkpoint(
        tmp_path / "checkpoints",
        1,
        model_state=model.state_dict(),
        config=asdict(CONFIG),
        tokenizer_json=vocab.to_json(),
        optimizer_state=None,
        trainer={"identity": {"max_seq_len": 2048}},
        keep_last=1,
    )
    return tmp_path


def test_the_command_writes_a_song_and_its_picture(checkpoint, tmp_path, capsys):
    compose(3, bars=2).dump(tmp_path / "prompt.mid")
    args = "--bars 2 --max-tokens 300 --time_signature 3/4 --tempo 90 --instruments drums,0 --seed 5".split()
    files = ["--output", tmp_path / "new.mid", "--picture", tmp_path / "new.png"]
    module.main(["--checkpoint", str(checkpoint), *map(str, files), *args])
    assert any(m.type == "note_on" for track in mido.MidiFile(tmp_path / "new.mid").tracks for m in track)
    assert (tmp_path / "new.png").stat().st_size > 1000
    assert "2 new bars" in capsys.readouterr().out
    args = "--bars 1 --prompt_bars 1 --max_tokens 100".split()
    files = ["--output", tmp_path / "more.mid", "--prompt", tmp_path / "prompt.mid"]
    module.main(["--checkpoint", str(checkpoint), *map(str, files), *args])
    assert mido.MidiFile(tmp_path / "more.mid").tracks


@pytest.mark.parametrize(
    "args, says",
    [
        (["--time_signature", "4/5"], "--time_signature"),
        (["--instruments", "violine"], "did you mean violin"),
        (["--prompt_bars", "2"], "goes with --prompt"),
        (["--picture", "roll.gif"], "end in .png"),
        (["--prompt", "none.mid"], "unreadable"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--output", "no/such/folder/x.mid"], "no folder"),
        (["--max_tokens", "3"], "wrote no note in 3 tokens"),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, args, says):
    start = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.mid")]
    with pytest.raises(UserError, match=says):
        module.main([*start, *args])
    assert not (tmp_path / "x.mid").exists()
