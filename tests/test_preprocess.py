"""The preprocess command, end to end, on composed songs and the real one that miditoolkit installs."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from meloformer import preprocess
from meloformer.data import build, damage, near_duplicates, shards
from meloformer.data.inputs import find_files, in_order
from meloformer.data.shards import ShardSet
from meloformer.data.workers import Result
from meloformer.files import read_json
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.preprocess_runs import FILES, KEPT, change_json, command, contents, fails


def test_songs_are_the_tokens_of_their_files(corpus, processed):
    songs = ShardSet(processed)
    there = {songs[i].tobytes() for i in range(len(songs))}
    assert len(there) == len(songs) == KEPT
    tokenizer = HIDTokenizer()
    for path in (corpus / "song 00.mid", corpus / "deep" / "real.MIDI"):
        assert tokenizer.encode(path).tobytes() in there
    for i in range(len(songs)):
        assert songs.bars[i] == np.count_nonzero(vocab.CHORD.mask(songs[i]))
    assert read_json(processed / shards.TOKENIZER) == json.loads(json.dumps(HIDTokenizer().to_json()))
    assert len(damage.verify(processed)) == KEPT
    assert damage.is_checked(songs)


def test_first_of_equal_files_wins(corpus, processed):
    order = in_order(find_files(str(corpus)), 0, None)
    failures = {}
    for path in sorted(processed.glob("shard-*.json")):
        failures.update((path, reason) for path, reason, _ in json.loads(path.read_text())["failures"])
    pairs = (("song 03.mid", "deep/er/copy.kar"), ("aaa.mid", "deep/real.MIDI"))
    for pair in pairs:
        first, second = sorted((str(corpus / name) for name in pair), key=order.index)
        assert failures[second] == "duplicate"
        assert first not in failures
    assert len(failures) == FILES - KEPT


def test_failed_tsv_has_one_line_per_file(corpus, processed):
    lines = (processed / "failed.tsv").read_bytes().split(b"\n")
    assert lines[0] == b"path\treason\tdetail"
    assert lines[-1] == b""
    rows = [line.split(b"\t") for line in lines[1:-1]]
    assert [len(row) for row in rows] == [3] * (FILES - KEPT)
    escaped = os.fsencode(str(corpus)) + b"/tab\\there, line\\nthere, caf\xe9.mid"
    assert escaped in {row[0] for row in rows}
    assert {row[1].decode() for row in rows} <= set(build.ALL_REASONS)


def test_table(corpus, processed, capsys, monkeypatch):
    monkeypatch.setattr(damage, "write_json", lambda *_: pytest.fail("a finished folder may be read-only"))
    preprocess.main(command(corpus, processed))
    out = capsys.readouterr().out
    assert "is finished already" in out
    numbers = {line[:24].strip(): line[24:37].strip() for line in out.splitlines()}
    assert (numbers["files"], numbers["kept"], numbers["dropped"]) == (
        str(FILES),
        str(KEPT),
        str(FILES - KEPT),
    )
    assert numbers["duplicate"] == "2"
    assert int(numbers["train songs"]) + int(numbers["val songs"]) == KEPT
    assert int(numbers["val songs"]) > 0


def test_number_of_workers_changes_no_byte(corpus, processed, tmp_path):
    preprocess.main(command(corpus, tmp_path / "data", workers=3))
    assert contents(tmp_path / "data") == contents(processed)


def test_list_file_gives_the_same_songs(corpus, processed, tmp_path, monkeypatch, in_process):
    """Names relative to the list, Windows line ends, a blank line, a byte order mark."""
    names = [os.path.relpath(path, corpus) for path in find_files(str(corpus))]
    names = [name for name in names if "\n" not in name]
    lines = b"\xef\xbb\xbf" + b"\r\n".join(os.fsencode(name) for name in names) + b"\r\n\r\n"
    (corpus / "list.txt").write_bytes(lines)
    monkeypatch.chdir(tmp_path)
    preprocess.main(command(corpus / "list.txt", tmp_path / "data"))
    a, b = ShardSet(processed), ShardSet(tmp_path / "data")
    assert {d.tobytes() for d in a.digests} == {d.tobytes() for d in b.digests}


def test_limit_takes_the_first_of_the_shuffled(corpus, tmp_path, in_process):
    preprocess.main(command(corpus, tmp_path / "data", "--limit", "7", "--seed", "5"))
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "data").glob("shard-*.json"))]
    assert [record["files"] for record in records] == [3, 3, 1]
    files = find_files(str(corpus))
    order = in_order(files, 5, None)
    assert order != files
    assert sorted(order) == files
    assert in_order(files, 5, 7) == order[:7]


def test_no_song_at_all(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.mid").touch()
    for _ in range(2):  # the second run resumes, and has to say the same
        line = fails(["--input", str(source), "--output", str(tmp_path / "out"), "--workers", "1"], capsys)
        assert "none of 3 files became a song (3 times" in line
    assert not (tmp_path / "out" / shards.MANIFEST).exists()
    assert len((tmp_path / "out" / "failed.tsv").read_text().splitlines()) == 4


BAD_ARGUMENTS = {
    "nothing": ([], "--input and --output are required"),
    "no output": (["--input", "x"], "--input and --output are required"),
    "no workers": (["--input", "x", "--output", "y", "--workers", "0"], "not at least 1"),
    "endless timeout": (["--input", "x", "--output", "y", "--timeout", "1" + "0" * 20], "--timeout"),
    "endless memory": (["--input", "x", "--output", "y", "--memory-mb", "9" * 14], "--memory-mb"),
    "negative seed": (["--input", "x", "--output", "y", "--seed", "-1"], "--seed"),
    "val_split 1": (["--input", "x", "--output", "y", "--val_split", "1"], "not below 1"),
    "no such input": (["--input", "nowhere", "--output", "y"], "No such file"),
    "verify and input": (["--input", "x", "--verify", "y"], "--verify cannot be combined"),
    "verify nothing": (["--verify", "nowhere"], "nowhere: is not a folder"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, capsys):
    arguments, message = BAD_ARGUMENTS[case]
    assert message in fails(arguments, capsys)


def test_output_that_is_a_file(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in fails(command(corpus, tmp_path / "file"), capsys)


def test_verify_command(processed, tmp_path, capsys):
    preprocess.main(["--verify", str(processed)])
    assert f"{KEPT} songs" in capsys.readouterr().out
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    path = folder / "shard-00000.bin"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert "SHA-256" in fails(["--verify", str(folder)], capsys)


def falsify(name: str, change):
    return lambda folder: change_json(folder / name, change)


def append(name: str, text: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text("latin-1") + text, "latin-1")


MANIFEST, RUN = shards.MANIFEST, build.RUN
FALSIFIED = {
    "val_split": (falsify(MANIFEST, lambda m: m.update(val_split=0.9)), "val_split"),
    "songs": (falsify(MANIFEST, lambda m: m.update(songs=1)), "songs"),
    "no tokens": (falsify(MANIFEST, lambda m: m.pop("tokens")), "tokens"),
    "vocab_size": (falsify(MANIFEST, lambda m: m.update(vocab_size=1)), "vocab_size"),
    "first shard dropped": (falsify(MANIFEST, lambda m: m["shards"].pop(0)), "manifest.json"),
    "last shard dropped": (falsify(MANIFEST, lambda m: m["shards"].pop()), "manifest.json"),
    "run of another val_split": (falsify(RUN, lambda run: run.update(val_split=0.9)), "run.json"),
    "junk after the run": (append(RUN, " "), "run.json"),
    "junk in the failures": (append(build.FAILED, "junk"), "failed.tsv"),
    "failures gone": (lambda folder: (folder / build.FAILED).unlink(), "failed.tsv"),
    "mends": (falsify("shard-00000.json", lambda r: r["mends"].update(x=1)), "records"),
}


@pytest.mark.parametrize("case", FALSIFIED)
def test_verify_compares_the_manifest_with_the_run(processed, tmp_path, capsys, case):
    damage, message = FALSIFIED[case]
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    damage(folder)
    assert message in fails(["--verify", str(folder)], capsys)


def test_verify_needs_a_sane_run(processed, tmp_path, capsys):
    """A manifest that lists the damaged run.json as it is."""
    folder = Path(shutil.copytree(processed, tmp_path / "data"))
    change_json(folder / RUN, lambda run: run.update(shard_size=0))
    change_json(folder / MANIFEST, lambda manifest: manifest.update(run=shards.file_entry(folder / RUN)))
    assert "run.json: is damaged" in fails(["--verify", str(folder)], capsys)


def test_workers_need_no_torch():
    code = "import sys, meloformer.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MAX_BYTES_PER_FILE = 500  # paths of 88 characters included


@pytest.mark.parametrize("length", [10, 1000])
def test_memory_per_file(tmp_path, monkeypatch, length):
    """The parent keeps of each file its path and a digest, and nothing that grows with the song."""
    generator = np.random.default_rng(0)

    def run_tasks(function, items, **_):
        for i, path in enumerate(items):
            ids = np.full(length, vocab.CHORD.start, np.uint16)
            tempo, label = vocab.BPM.start + i % 400, vocab.CHORD.start + i // 400
            ids[:6] = vocab.BOS, vocab.BAND.start, vocab.CHORD.start, vocab.TS.start, tempo, label
            ids[-1] = vocab.EOS
            motifs = np.sort(generator.integers(0, 2**64, 8, np.uint64))
            yield Result(path, build.Encoded(ids, length - 5, [], motifs))

    monkeypatch.setattr(build, "run_tasks", run_tasks)
    monkeypatch.setattr(near_duplicates, "_AT_ONCE", 1 << 10)  # so that these are many motifs already
    monkeypatch.setattr(damage, "_AT_ONCE", 1 << 13)  # and these many tokens

    def peak(count):
        names = tmp_path / f"{count}.txt"
        with open(names, "w") as file:
            file.writelines(
                f"/collections/a-large-one/full/{i % 256:02x}/{i:050d}.mid\n" for i in range(count)
            )
        gc.collect()
        tracemalloc.start()
        build.preprocess(str(names), str(tmp_path / str(count)), num_workers=1, shard_size=500)
        bytes_at_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_at_peak

    peak(500)  # what is imported or cached at the first call is not of the files
    assert (peak(4000) - peak(1000)) / 3000 < MAX_BYTES_PER_FILE
