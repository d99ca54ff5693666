import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Two test processes on two cores: more threads would only wait for each other. Inherited by commands.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # helpers beside the tests; meloformer and benchmarks

# Triton decides when a kernel is defined whether it is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton") is not None:
        from helpers.interpreter import spare_wasted_work

        spare_wasted_work()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Shards of a dozen short songs, some of them for validation."""
    from meloformer import preprocess
    from meloformer.composer.compose import compose

    folder = tmp_path_factory.mktemp("data")
    (folder / "midi").mkdir()
    for seed in range(12):
        compose(seed, bars=5 + seed % 2).dump(folder / "midi" / f"{seed}.mid")
    preprocess.main(
        ["--input", str(folder / "midi"), "--output", str(folder / "shards"), "--val-split", "0.2"]
    )
    return folder / "shards"


@pytest.fixture(scope="session")
def songs():
    """Tokens of 24 songs of 2 to 40 bars, some of them in changing metres."""
    import numpy as np

    from meloformer.composer.compose import compose
    from meloformer.tokens.tokenizer import HIDTokenizer

    generator, tokenizer = np.random.default_rng(0), HIDTokenizer()
    return [tokenizer.encode(compose(seed, bars=int(generator.integers(2, 41)))) for seed in range(24)]


@pytest.fixture(scope="session")
def shards(songs, tmp_path_factory):
    """A ShardSet of them, of which one shard is empty."""
    from meloformer.data.shards import ShardSet

    from helpers.folders import write_folder

    return ShardSet(write_folder(tmp_path_factory.mktemp("data") / "shards", songs, (10, 0, 14)))


# The fixtures `corpus`, `processed` and `in_process`; imported here, where Triton has been told how to run.
from helpers.preprocess_runs import corpus, in_process, processed  # noqa: E402, F401
