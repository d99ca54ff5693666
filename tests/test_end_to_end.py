"""The way of a user: a list of files -> preprocess -> train -> generate, by the commands themselves."""

import subprocess
import sys
from pathlib import Path

import mido
import pytest

from meloformer.checkpoint.store import find_checkpoint, load_checkpoint
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.songs import EXAMPLE

ROOT = Path(__file__).resolve().parent.parent


def run(module, *args):
    done = subprocess.run(
        [sys.executable, "-m", f"meloformer.{module}", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_a_list_of_files_to_a_new_song(tmp_path):
    (tmp_path / "midi_files.txt").write_text(f"{EXAMPLE}\n{tmp_path / 'missing.mid'}\n")
    data, output, song = tmp_path / "processed_data", tmp_path / "run", tmp_path / "song.mid"
    table = run("preprocess", "--input", tmp_path / "midi_files.txt", "--output", data, "--val-split", 0)
    assert "unreadable" in table
    run(
        *("train", "--data_dir", data, "--output_dir", output, "--model_size", "small"),
        *("--max_seq_len", 1024, "--batch_size", 1, "--gradient_accumulation_steps", 1),
        *("--max_steps", 3, "--device", "cpu"),
    )
    checkpoint = load_checkpoint(find_checkpoint(output))
    assert checkpoint.step == 3 and checkpoint.config.size == "small"
    run("generate", "--checkpoint", output, "--output", song, "--bars", 4, "--max_tokens", 300)
    notes = [m for track in mido.MidiFile(song).tracks for m in track if m.type == "note_on" and m.velocity]
    assert notes
    check(HIDTokenizer().encode(song))
