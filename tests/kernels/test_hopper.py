"""Kernels in Gluon. Nothing interprets it: on a CPU their order of tiles and their code are tested, their
results on a GPU of Hopper's."""

import types
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from random import Random

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import meloformer.kernels.ops  # noqa: F401, registers the operators
from meloformer.kernels import hopper_forward, launch
from meloformer.kernels.launch import (
    SPECIALIZED,
    Gpu,
    Specialized,
    can_specialize,
    launches_on,
    override,
)
from meloformer.kernels.plan import Plan

from helpers.attention_cases import (
    check_error,
    dense_case,
    outputs_and_gradients,
    plain_attention,
    song,
    structure,
)
from helpers.fake_gpu import builds, gpu_of, programs_at_once
from helpers.plan_cases import DEVICE, PlanOfMasks

known_gluon = pytest.mark.skipif(not launch.knows_gluon(), reason="a Triton whose Gluon is not known")
HOPPER = DEVICE == "cuda" and can_specialize(Gpu.of(torch.device("cuda")), 64, 2)


def as_python(kernel):
    """A function on scalars, called with numbers of Python."""
    numbers = types.SimpleNamespace(where=lambda c, a, b: a if c else b, minimum=min, maximum=max)
    return types.FunctionType(kernel.fn.__code__, {**kernel.fn.__globals__, "gl": numbers})


@pytest.mark.parametrize("seed", range(8))
def test_each_block_finds_its_own_tiles_in_the_ring_and_skips_no_round_of_it(seed):
    place, turns_before, tile_at = map(
        as_python, (hopper_forward._place, hopper_forward._turns_before, hopper_forward._tile_at)
    )
    random = Random(seed)
    for _ in range(100):
        full, masked = [random.randrange(9) for _ in "01"], [random.randrange(6) for _ in "01"]
        shared = random.randint(0, min(full))
        turns = [f + m for f, m in zip(full, masked)]
        alternating, places = min(turns) - shared, sum(turns) - shared
        parts = random.randint(1, 3)
        taken = [], []
        for part in range(parts):
            begin, end = (i * places // parts for i in (part, part + 1))
            lists = 1000, masked[0], turns[0], 2000, masked[1], turns[1]
            ring = {at: tile_at(at, shared, alternating, *lists) for at in range(begin, end)}
            owners = {at: [] for at in ring}
            for which in (0, 1):
                before, after = (
                    turns_before(at, which, shared, alternating, turns[which]) for at in (begin, end)
                )
                last = begin - 1
                for turn in range(before, after):
                    at = place(turn, which, shared, alternating)
                    assert last < at <= last + 2
                    last = at
                    owners[at].append(which)
                    whose = 0 if turn < shared else which  # of a shared tile the first block's list is read
                    tile = masked[whose] + turn if turn < full[which] else turn - full[which]
                    assert ring[at] == 1000 * (whose + 1) + tile
                taken[which].extend(range(before, after))
            assert all(owners[at] == [0, 1] if at < shared else len(owners[at]) == 1 for at in ring)
        assert [*map(list, taken)] == [[*range(number)] for number in turns]


def no_metadata(name):
    raise PackageNotFoundError(name)


def test_they_are_asked_for_where_they_can_run(monkeypatch):
    hopper = gpu_of(90)
    for known in ("3.6.0", "3.7.1+git1234567"):
        monkeypatch.setattr(launch, "version", lambda name, known=known: known)
        assert can_specialize(hopper, 64, 2)
    for gpu, dim, size in (
        (hopper, 64, 4),
        (hopper, 32, 2),
        (gpu_of(80), 64, 2),
        (gpu_of(120), 64, 2),
        (replace(hopper, vendor="amd"), 64, 2),
    ):
        assert not can_specialize(gpu, dim, size)
    for unknown in (lambda name: "3.5.1", lambda name: "3.9.0", no_metadata):
        monkeypatch.setattr(launch, "version", unknown)
        assert not can_specialize(hopper, 64, 2)
    with pytest.raises(ValueError, match="lag must be 1 to 2, got 3"):
        Specialized(80, 24, lag=3)


def check_build(build, products, programs):
    """So many programs on a multiprocessor, copies of 16 bytes, products that do not wait for each other; and
    no buffer of the ring is announced or let go before all threads of the warp group are done with it."""
    assert build["arrivals"] >= 3 and build["arrivals_alone"] == 0, build
    assert not build["serialized"] and build["spills"] <= 64, build
    assert 8 <= build["cp_async"] <= 10 and build["wgmma"] == products, build
    assert programs_at_once(build, 90) == programs, build


@known_gluon
def test_what_the_compiler_makes_of_the_forward():
    ((build,),) = builds((90, "bfloat16", 64, ("specialized_forward",)))
    check_build(build, products=32, programs=2)


@known_gluon
@pytest.mark.builds
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_the_compiler_makes_of_all(dtype):
    (found,) = builds((90, dtype, 64, ("specialized",)))
    for build, (products, programs) in zip(found, [(32, 2), (24, 3), (24, 3), (36, 2), (36, 2)], strict=True):
        check_build(build, products, programs)
    first = found.pop(1)  # the gradient of queries, which the others need two numbers of
    assert first["waits"] == 1 and first["reads_ahead"] == 0, first
    # A thread of the consumers stores four of the first numbers, and four of the second.
    assert first["starts_next"] == 1 and first["starts_next_ahead"] == 0 and first["published"] == 8, first
    for later, waits in zip(found, (3, 2, 2, 2), strict=True):  # the forward's for either block, and its end
        assert later["starts_next"] == later["starts_next_ahead"] == 1, later
        assert later["waits"] == waits and later["reads_ahead"] > 0 == later["writes_ahead"], later


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="no GPU of Hopper's")
class TestOnHopper:
    NAMES = ("o", "q", "k_s", "v_s", "k_r", "v_r")

    def launches(self, **fields):
        """Those of the twins, and the specialized ones; `fields` are of the latter."""
        twins = launches_on(Gpu.of(torch.device("cuda")), 64, 2)
        special = {name: replace(each, **fields) for name, each in SPECIALIZED.items()}
        return twins, replace(twins, **special)

    def check(self, inputs, plan, launches, masks):
        """The errors against float64 are much the same as those of the twins."""

        def plain(q, k_s, v_s, k_r, v_r):
            return plain_attention(q, torch.cat([k_s, k_r], 2), torch.cat([v_s, v_r], 2), masks)

        def ours(*arguments):
            return torch.ops.meloformer.update(*arguments, *plan)[0]

        exact = outputs_and_gradients(plain, [x.double() for x in inputs])
        results = []
        for each in launches:
            with override(each):
                results.append(outputs_and_gradients(ours, inputs))
        with override(launches[1]):
            again = outputs_and_gradients(ours, inputs)
        for name, gold, twin, got, same in zip(self.NAMES, exact, *results, again):
            check_error(name, got, twin, gold, times=1.5)
            assert torch.equal(got, same), name

    def draw(self, rows, heads, n, m, dtype, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        return [
            torch.randn(rows, length, heads, 64, device="cuda", generator=generator).to(dtype).transpose(1, 2)
            for length in (n, m, m, n, n, n)
        ]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("split", [0, 1, 3])
    @pytest.mark.parametrize("kind_rule", ["any", "alike"])
    def test_songs(self, kind_rule, split, dtype):
        r = Random(split)
        batch = [
            [song(r, 60, (128, 33, 0, 80, 25), resting=0.2)],
            [song(r, 9), song(r, 20, (0,)), song(r, 3)],
        ]
        packed = structure(batch, num_summaries=64, kind_rule=kind_rule).to("cuda")
        plan = Plan(packed, split).finalize()
        assert plan.items[4, : plan.needs[12], 6].any() or kind_rule == "alike"
        inputs = self.draw(*packed.doc.shape[:1], 3, packed.doc.shape[1], 64, dtype)
        self.check(inputs, plan.tensors, self.launches(), dense_case(packed).regular_mask.to("cuda"))

    @pytest.mark.parametrize("fields", [{}, dict(num_stages=3, lag=1), dict(num_stages=6, lag=4)], ids=str)
    @pytest.mark.parametrize("seed", range(4))
    def test_any_mask(self, seed, fields):
        generator = torch.Generator().manual_seed(seed)
        dice = torch.rand(2, 700, 713, generator=generator)
        near, far = dice < 0.2, dice > 0.6
        near[:, 5:9], far[:, 8:12] = False, False
        near[:, 20:90, 60:], far[0, 200:300] = False, False
        far[:, :, 50:450] |= seed % 2 == 0
        far[:, :, :13] = False
        far &= ~near
        plan = PlanOfMasks(near, far, 13, split=1 + 3 * (seed // 2), seed=seed)
        inputs = self.draw(2, 2, 700, 13, torch.bfloat16, seed)
        self.check(inputs, plan.tensors, self.launches(**fields), (near | far).to("cuda"))

    def test_strides_that_do_not_tell_where_rows_begin(self):
        """Tokens 72 elements apart: at multiples of 16 bytes, but not of 16 elements."""
        packed = structure([[song(Random(4), 30, (128, 33))]], num_summaries=32).to("cuda")
        inputs = self.draw(1, 1, packed.doc.shape[1], 32, torch.bfloat16)
        apart = [torch.nn.functional.pad(x, (0, 8))[..., :64] for x in inputs]
        assert all(x.stride(2) == 72 for x in apart)
        plan = Plan(packed).finalize().tensors
        self.check(apart, plan, self.launches(), dense_case(packed).regular_mask.to("cuda"))

    def test_a_hundred_repeats(self):
        packed = structure([[song(Random(3), 60, (128, 33, 0), resting=0.1)]], num_summaries=64).to("cuda")
        plan = Plan(packed, 7).finalize().tensors
        inputs = self.draw(1, 8, packed.doc.shape[1], 64, torch.bfloat16)

        def ours(*arguments):
            return torch.ops.meloformer.update(*arguments, *plan)[0]

        with override(self.launches()[1]):
            first = outputs_and_gradients(ours, inputs)
            for _ in range(100):
                assert all(map(torch.equal, first, outputs_and_gradients(ours, inputs)))
