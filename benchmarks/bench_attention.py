"""`pytest benchmarks --benchmark-only`: every backend, part, length, batch and model size.

Choose with -k, say `-k "triton and update and backward"`. The times hold launches and the wait for
the GPU: see benchmarks.report for what the kernels alone take. What needs a GPU is skipped without.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch

from benchmarks.attention.measure import Shape, phase_inputs
from benchmarks.common.timing import FLUSH_BYTES
from benchmarks.songs.loading import compose_songs
from benchmarks.songs.structures import pack
from meloformer.kernels import Structure, make_attention
from meloformer.kernels.attention import BACKENDS

HEADS = {"small": 4, "base": 8, "large": 12, "xlarge": 16}  # of 64 channels
ROUNDS = 20
REFERENCE_UP_TO = 8192  # dense: beyond that it measures patience
CUDA = torch.cuda.is_available()


class Case(NamedTuple):
    size: str
    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.size}-{self.length}-batch{self.batch}"


ON_CPU = (Case("small", 256, 1), Case("small", 256, 2))
ON_GPU = (
    *(Case("base", length, 1) for length in (2048, 8192, 24_576, 98_304)),
    *(Case("base", 8192, batch) for batch in (4, 8)),
    *(Case(size, 8192, 1) for size in ("small", "large", "xlarge")),
)

pytestmark = [
    pytest.mark.parametrize("case", ON_CPU + ON_GPU, ids=str),
    pytest.mark.parametrize("backend", BACKENDS),
]


@cache
def structure_of(length: int, batch: int) -> Structure:
    """On CPU. With every row another song comes first."""
    return pack(list(compose_songs(8, bars=150).values()), length, rows=batch)


@pytest.fixture(autouse=True)
def possible(backend, case):
    """Skips what this machine cannot do, or nobody would wait for."""
    if not CUDA and backend != "reference":
        pytest.skip("needs a CUDA device")
    if not CUDA and case in ON_GPU:
        pytest.skip("needs a CUDA device: too long for a CPU")
    if CUDA and backend != "triton" and case.length > (24_576 if backend == "flex" else REFERENCE_UP_TO):
        pytest.skip("too slow at this length")


@pytest.fixture
def structure(possible, case) -> Structure:
    return structure_of(case.length, case.batch).to("cuda" if CUDA else "cpu")


@pytest.fixture
def measure(benchmark, case):
    """Calls `run(*prepare())` as a round, until the device is done and with a cold L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if CUDA else None

    def measured(run, prepare=tuple):
        def setup():
            prepared = prepare()
            if CUDA:
                flush.zero_()
                torch.cuda.synchronize()
            return prepared, {}

        def round_(*arguments):
            run(*arguments)
            if CUDA:
                torch.cuda.synchronize()

        benchmark.extra_info.update(case._asdict(), gpu=torch.cuda.get_device_name() if CUDA else None)
        benchmark.pedantic(round_, setup=setup, rounds=ROUNDS, warmup_rounds=2)

    return measured


@pytest.fixture
def attend(structure, backend, case, phase):
    """The phase, its arguments and a cotangent of its output."""
    shape = Shape(HEADS[case.size], 64, torch.bfloat16 if CUDA else torch.float32)
    *arguments, cotangent = phase_inputs(structure, phase, shape)
    return getattr(make_attention(structure, backend), phase), arguments, cotangent


PHASES = pytest.mark.parametrize("phase", ["update", "summarize"])


def test_plan(measure, structure, backend):
    measure(lambda: make_attention(structure, backend))


@PHASES
def test_forward(measure, attend):
    function, arguments, _ = attend
    measure(lambda: function(*arguments))


@PHASES
def test_backward(measure, attend):
    function, arguments, cotangent = attend
    measure(
        lambda out: torch.autograd.grad(out, arguments, cotangent), prepare=lambda: (function(*arguments),)
    )


@PHASES
def test_forward_and_backward(measure, attend):
    function, arguments, cotangent = attend
    measure(lambda: torch.autograd.grad(function(*arguments), arguments, cotangent))
