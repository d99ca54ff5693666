"""Near-duplicates: copies in disguise are found, other songs are not, and no cluster stands on both sides."""

import copy
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from miditoolkit import MidiFile

from meloformer import cli, preprocess
from meloformer.composer.compose import compose
from meloformer.data import build, damage, near_duplicates, shards
from meloformer.data.division import divide, in_validation
from meloformer.data.inputs import find_files, in_order
from meloformer.data.motifs import motifs
from meloformer.data.near_duplicates import MARGIN, SHARE, Motifs, clusters, shared
from meloformer.data.shards import LEFT_OUT, TRAIN, VALIDATION, ShardSet, content_digest
from meloformer.data.workers import Result
from meloformer.tokens.tokenizer import HIDTokenizer

OTHERS = 12  # composed songs that a copy could be mistaken for
BARS = 16


@cache
def song(seed: int) -> MidiFile:
    return compose(seed, bars=BARS)


def tokens(midi: MidiFile) -> np.ndarray:
    return HIDTokenizer().encode(midi)


@cache
def of_song(seed: int) -> np.ndarray:
    return motifs(tokens(song(seed)))


# Has drums and at least three instruments beside them.
ORIGINAL = next(
    seed
    for seed in range(50)
    if sorted(i.is_drum for i in song(seed).instruments)[-4:] == [False] * 3 + [True]
)


def together(sets: list[np.ndarray], per_part: int = 5) -> list[frozenset[int]]:
    """The clusters of two or more songs, given the motifs of each."""
    parts = []
    for at in range(0, len(sets), per_part):
        of_part = sets[at : at + per_part]
        offsets = np.cumsum([0, *map(len, of_part)], dtype=np.int64)
        parts.append((np.concatenate(of_part), offsets))
    # Digests stand for content: equal sets in tests are told apart by their numbers alone.
    digests = [np.frombuffer(content_digest(np.append(s.view(np.uint16), 0)), np.uint8) for s in sets]
    label = clusters(Motifs(parts), np.array(digests))
    assert all(label[label] == label) and all(label <= np.arange(len(sets)))
    found = [frozenset(np.flatnonzero(label == first).tolist()) for first in np.unique(label)]
    return [cluster for cluster in found if len(cluster) > 1]


# --- what is found --------------------------------------------------------------------------------


def transposed(midi: MidiFile, by: int) -> None:
    for instrument in midi.instruments:
        for note in instrument.notes:
            note.pitch += 0 if instrument.is_drum else by


def faster(midi: MidiFile) -> None:
    for tempo in midi.tempo_changes:
        tempo.tempo *= 1.3


def quieter(midi: MidiFile) -> None:
    for instrument in midi.instruments:
        for note in instrument.notes:
            note.velocity = 1 + note.velocity // 2


def staccato(midi: MidiFile) -> None:
    for instrument in midi.instruments:
        for note in instrument.notes:
            note.end = note.start + max(1, (note.end - note.start) // 2)


def other_instruments(midi: MidiFile) -> None:
    for instrument in midi.instruments:
        instrument.program = (instrument.program + 5) % 128


def only(midi: MidiFile, first: int, last: int) -> None:
    """Bars `first` to `last` - 1, quarters times the numerator long."""
    signature = midi.time_signature_changes[0]
    bar = midi.ticks_per_beat * 4 * signature.numerator // signature.denominator
    for instrument in midi.instruments:
        instrument.notes = [n for n in instrument.notes if first * bar <= n.start < last * bar]
        for note in instrument.notes:
            note.start, note.end = note.start - first * bar, note.end - first * bar


def without(midi: MidiFile, which: int) -> None:
    pitched = [i for i in midi.instruments if not i.is_drum]
    midi.instruments.remove(pitched[which])


def without_drums(midi: MidiFile) -> None:
    midi.instruments = [i for i in midi.instruments if not i.is_drum]


def in_disguise(midi: MidiFile) -> None:
    transposed(midi, -2)
    faster(midi)
    quieter(midi)
    without_drums(midi)
    only(midi, 0, BARS * 3 // 4)


COPIES: dict[str, Callable[[MidiFile], None]] = {
    "a tone up": lambda midi: transposed(midi, 2),
    "a fifth down": lambda midi: transposed(midi, -7),
    "faster": faster,
    "quieter": quieter,
    "staccato": staccato,
    "other instruments": other_instruments,
    "first half": lambda midi: only(midi, 0, BARS // 2),
    "second half": lambda midi: only(midi, BARS // 2, BARS),
    "without the first instrument": lambda midi: without(midi, 0),
    "without the last instrument": lambda midi: without(midi, -1),
    "without drums": without_drums,
    "in disguise": in_disguise,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found(name):
    midi = copy.deepcopy(song(ORIGINAL))
    COPIES[name](midi)
    sets = [of_song(seed) for seed in range(100, 100 + OTHERS)]
    assert together([*sets, of_song(ORIGINAL), motifs(tokens(midi))]) == [frozenset({OTHERS, OTHERS + 1})]


def test_a_song_inside_a_long_one_is_found():
    long = np.unique(np.concatenate([of_song(seed) for seed in range(200, 220)]))
    assert together([of_song(seed) for seed in range(100, 105)] + [of_song(203), long]) == [frozenset({5, 6})]


def test_composed_songs_are_no_near_duplicates():
    """The demo and many tests preprocess such songs, short ones too."""
    short = [motifs(tokens(compose(seed, bars=3 + seed % 4))) for seed in range(30)]
    assert together([of_song(seed) for seed in range(40)]) == []
    assert together(short) == []


def test_drums_and_plain_bars_are_no_motifs():
    midi = copy.deepcopy(song(ORIGINAL))
    midi.instruments = [i for i in midi.instruments if i.is_drum]
    assert len(midi.instruments) and len(motifs(tokens(midi))) == 0
    midi = copy.deepcopy(song(ORIGINAL))
    for instrument in midi.instruments:
        for note in instrument.notes:
            note.pitch = 60 + note.pitch % 2  # two pitches make no motif
    assert len(motifs(tokens(midi))) == 0


# --- clusters of any sets -------------------------------------------------------------------------


def collection(seed: int) -> list[np.ndarray]:
    """Sets as a raw collection has them: versions of songs, excerpts, and riffs that many play."""
    dice = np.random.default_rng(seed)

    def fresh(count: int) -> np.ndarray:
        return dice.integers(0, 2**64, count, np.uint64)

    riffs, sets = fresh(30), []
    for _ in range(40):
        own = fresh(dice.integers(4, 60))
        for _ in range(dice.integers(1, 5)):
            part = dice.choice(own, dice.integers(len(own) // 2, len(own) + 1), replace=False)
            sets.append(np.unique(np.concatenate((part, fresh(dice.integers(0, 10)), dice.choice(riffs, 4)))))
    return sets


def by_all_pairs(sets: list[np.ndarray]) -> list[frozenset[int]]:
    """What `clusters` finds, by the definition."""
    near = [{i} for i in range(len(sets))]
    for i, one in enumerate(sets):
        for j, other in enumerate(sets[:i]):
            if len(np.intersect1d(one, other)) >= SHARE * min(len(one), len(other)) + MARGIN:
                merged = near[i] | near[j]
                for member in merged:
                    near[member] = merged
    return sorted({frozenset(cluster) for cluster in near if len(cluster) > 1}, key=min)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_all_pairs(seed, monkeypatch):
    sets = collection(seed)
    expected = by_all_pairs(sets)
    assert len(expected) > 10
    assert together(sets) == expected
    monkeypatch.setattr(near_duplicates, "_AT_ONCE", 100)
    assert together(sets, per_part=1) == expected


def test_the_order_of_songs_does_not_matter():
    sets = collection(7)
    order = np.random.default_rng(0).permutation(len(sets))
    again = [frozenset(int(order[i]) for i in cluster) for cluster in together([sets[i] for i in order])]
    assert sorted(again, key=min) == together(sets)


def test_motifs_of_too_many_songs_do_not_count(monkeypatch):
    dice = np.random.default_rng(0)
    everywhere = dice.integers(0, 2**64, 20, np.uint64)
    own = [dice.integers(0, 2**64, 10, np.uint64) for _ in range(30)]
    sets = [np.unique(np.concatenate((everywhere, mine))) for mine in own]
    sets.append(np.unique(np.concatenate((sets[0], dice.integers(0, 2**64, 9, np.uint64)))))
    monkeypatch.setattr(near_duplicates, "COMMON", 31)
    assert together(sets) == [frozenset(range(31))]
    monkeypatch.setattr(near_duplicates, "COMMON", 30)
    assert together(sets) == [frozenset({0, 30})]


def test_no_songs_and_no_motifs():
    nothing = np.zeros(0, np.uint64)
    assert len(clusters(Motifs([(nothing, np.zeros(1, np.int64))]), np.zeros((0, 16), np.uint8))) == 0
    assert together([nothing, of_song(0), nothing]) == []
    assert shared(nothing, of_song(0), nothing) == 0


# --- the division ---------------------------------------------------------------------------------

CLUSTER = np.array([0, 0, 2, 3, 3, 3, 6])
LENGTHS = np.array([10, 20, 5, 30, 30, 7, 9])
DIGESTS = np.random.default_rng(1).integers(0, 256, (7, 16), dtype=np.uint8)
DIGESTS[4], DIGESTS[3] = 0, 1  # equal lengths: the lower digest is kept


def division(named: list[int] | None = None, keep_all: bool = False):
    digests = None if named is None else {DIGESTS[i].tobytes() for i in named}
    return divide(CLUSTER, LENGTHS, DIGESTS, val_split=0.5, named=digests, keep_all=keep_all)


def test_the_longest_song_of_a_cluster_is_kept():
    made = division()
    assert made.kept.tolist() == [1, 1, 2, 4, 4, 4, 6]
    assert np.flatnonzero(made.side == LEFT_OUT).tolist() == [0, 3, 5]
    assert (made.clusters, made.clustered, made.largest) == (2, 5, 3)
    drawn = in_validation(DIGESTS, 0.5)
    for kept in (1, 2, 4, 6):
        assert made.side[kept] == (VALIDATION if drawn[kept] else TRAIN)


def test_a_cluster_that_is_kept_stands_on_one_side():
    made = division(keep_all=True)
    assert not (made.side == LEFT_OUT).any()
    np.testing.assert_array_equal(made.side, made.side[made.kept])


@pytest.mark.parametrize("keep_all", [False, True])
def test_only_named_songs_validate(keep_all):
    made = division([5, 2, 3], keep_all)
    assert np.flatnonzero(made.side == VALIDATION).tolist() == [2, 3, 5]
    assert made.side[4] == LEFT_OUT and made.kept[4] == 3  # a near-duplicate of two that are named
    assert made.side[1] == made.side[6] == TRAIN
    assert made.side[0] == (TRAIN if keep_all else LEFT_OUT)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six songs, each a tone up too, two of them a bar shorter as well, and a file that is no song."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "deep").mkdir()
    for seed in range(6):
        song(seed).dump(folder / f"{seed}.mid")
        up = copy.deepcopy(song(seed))
        transposed(up, 2)
        up.dump(folder / "deep" / f"{seed} up.mid")
        if seed < 2:
            only(up, 0, BARS - 1)
            up.dump(folder / f"{seed} up and shorter.mid")
    (folder / "none.mid").touch()
    return folder


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Worker processes take seconds to start."""

    def run_tasks(function, items, **_):
        for item in items:
            yield Result(item, _encoded(item))

    monkeypatch.setattr(build, "run_tasks", run_tasks)


_encoded = cache(build.encode_file)


def run(folder: Path, output: Path, *more: str) -> ShardSet:
    preprocess.main(["--input", str(folder), "--output", str(output), "--shard-size", "4", *more])
    damage.verify(output)
    build.verify(output)
    return ShardSet(output)


def sides(output: Path) -> dict[str, int]:
    """On which side each file of a finished folder stands."""
    records = [json.loads(path.read_text()) for path in sorted(output.glob("shard-*.json"))]
    names = [Path(path).name for record in records for path in record["paths"]]
    return dict(zip(names, ShardSet(output).division.tolist(), strict=True))


def table(text: str) -> dict[str, str]:
    return {line[:24].strip(): line[24:37].strip() for line in text.splitlines()}


def test_near_duplicates_are_left_out_and_named(folder, tmp_path, capsys):
    songs = run(folder, tmp_path / "data", "--val-split", "0.5")
    told = table(capsys.readouterr().out)
    assert (told["files"], told["kept"], told["dropped"], told["near_duplicate"]) == ("15", "6", "9", "8")
    assert told["clusters"] == "6"
    train, val = songs.split("train"), songs.split("val")
    assert len(train) + len(val) == 6 and len(train) and len(val)
    rows = [line.split("\t") for line in (tmp_path / "data" / "failed.tsv").read_text().splitlines()]
    kept = {name for name, side in sides(tmp_path / "data").items() if side != LEFT_OUT}
    named = [(Path(path).name, detail) for path, reason, detail in rows if reason == "near_duplicate"]
    assert len(named) == 8 and {name for name, _ in named}.isdisjoint(kept)
    for name, detail in named:
        one = Path(detail.removeprefix("of ")).name
        assert one in kept and one[0] == name[0] and "shorter" not in one


def test_near_duplicates_that_are_kept_stand_on_one_side(folder, tmp_path, capsys):
    songs = run(folder, tmp_path / "data", "--val-split", "0.5", "--keep_near_duplicates")
    told = table(capsys.readouterr().out)
    assert (told["kept"], told["clusters"]) == ("14", "6") and "near_duplicate" not in told
    found = sides(tmp_path / "data")
    assert len(songs.split("train")) + len(songs.split("val")) == 14
    assert {side for side in found.values()} == {TRAIN, VALIDATION}
    for name, side in found.items():
        assert side == found[f"{name[0]}.mid"]


def test_the_order_of_files_does_not_matter(folder, tmp_path):
    run(folder, tmp_path / "a")
    run(folder, tmp_path / "b", "--seed", "5", "--shard-size", "7")
    assert sides(tmp_path / "a") == sides(tmp_path / "b")


def test_val_list(folder, tmp_path, capsys, monkeypatch):
    """Names relative to the folder, absolute, and as they stand."""
    monkeypatch.chdir(folder.parent)
    lines = ["deep/0 up.mid", str(folder / "3.mid"), f"{folder.name}/4.mid", ""]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    songs = run(folder, tmp_path / "data", "--val_list", str(tmp_path / "val.txt"))
    assert table(capsys.readouterr().out)["val songs"] == "3"
    found = sides(tmp_path / "data")
    assert {name for name, side in found.items() if side == VALIDATION} == {"0 up.mid", "3.mid", "4.mid"}
    assert found["0.mid"] == found["3 up.mid"] == LEFT_OUT
    assert len(songs.split("train")) == 3
    failed = (tmp_path / "data" / "failed.tsv").read_text()
    assert f"{folder / '0.mid'}\tnear_duplicate\tof {folder / 'deep' / '0 up.mid'}\n" in failed


def test_a_named_song_that_is_there_twice_validates(folder, tmp_path):
    """Whichever of two equal files comes first."""
    for name in ("a.mid", "b.mid", "c.mid"):
        (tmp_path / "songs").mkdir(exist_ok=True)
        (tmp_path / "songs" / name).write_bytes((folder / f"{int(name == 'c.mid')}.mid").read_bytes())
    for name in ("a.mid", "b.mid"):
        (tmp_path / "val.txt").write_text(name)
        songs = run(tmp_path / "songs", tmp_path / name[0], "--val_list", str(tmp_path / "val.txt"))
        assert [songs[int(i)].tobytes() for i in songs.split("val")] == [tokens(song(0)).tobytes()]


BAD = {
    "unknown": ("no such.mid", [], "'no such.mid' is not among the 15 files"),
    "beyond the limit": ("0.mid\n1.mid\n2.mid\n3.mid", ["--limit", "1"], "is not among the 1 files"),
    "empty": ("\n\n", [], "the list is empty"),
    "no text": ("a\0", [], "is not a text file"),
    "with a share": ("0.mid", ["--val_split", "0.1"], "--val_list and --val_split cannot be combined"),
}


def fails(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: preprocess.main(arguments))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("case", BAD)
def test_bad_val_list(folder, tmp_path, capsys, case):
    text, more, message = BAD[case]
    (tmp_path / "val.txt").write_text(text)
    command = ["--input", str(folder), "--output", str(tmp_path / "data"), *more]
    assert message in fails([*command, "--val_list", str(tmp_path / "val.txt")], capsys)
    assert "cannot be read" in fails([*command[:4], "--val_list", str(tmp_path / "nowhere.txt")], capsys)
    assert not (tmp_path / "data").exists()


def test_other_flags_are_another_run(folder, tmp_path, capsys):
    names = tmp_path / "val.txt"
    command = ["--limit", "8", "--seed", "1", "--val_list", str(names)]
    names.write_text(
        "\n".join(os.path.relpath(path, folder) for path in in_order(find_files(str(folder)), 1, 8))
    )
    run(folder, tmp_path / "data", *command)
    begun = ["--input", str(folder), "--output", str(tmp_path / "data"), "--shard-size", "4", *command]
    capsys.readouterr()
    assert "another run (keep_near_duplicates differ)" in fails([*begun, "--keep_near_duplicates"], capsys)
    assert "another run (val_split, val_list differ)" in fails(begun[:-2], capsys)
    names.write_text(names.read_text().split("\n")[0])
    assert "another run (val_list differ)" in fails(begun, capsys)


def test_verify_recomputes_the_division(folder, tmp_path, capsys):
    output = tmp_path / "data"
    run(folder, output)
    side = bytearray((output / shards.DIVISION).read_bytes())
    at = side.index(LEFT_OUT)
    side[at] = TRAIN
    (output / shards.DIVISION).write_bytes(side)
    manifest = json.loads((output / shards.MANIFEST).read_text())
    manifest["division"] = shards.file_entry(output / shards.DIVISION)
    (output / shards.MANIFEST).write_text(json.dumps(manifest))
    capsys.readouterr()
    assert "division.bin: does not agree" in fails(["--verify", str(output)], capsys)
    side[at] = 3
    (output / shards.DIVISION).write_bytes(side)
    assert "does not divide the songs" in fails(["--verify", str(output)], capsys)
