"""Kernels as the compiler builds them, for GPUs that are not there: see `helpers.fake_gpu`.

That they build at all, that the shared memory they take is there, and that the launch cache calls them as
Triton does, is asked of each build by the helper.
"""

import pytest

pytest.importorskip("triton")

from meloformer.kernels.launch import launches_on

from helpers.fake_gpu import GPUS, builds, gpu_of, programs_at_once

LOCAL = ("forward_local", "dq_local", "dkv_local")
SAME_INST = ("forward_same_inst", "dq_same_inst", "dkv_same_inst")
UPDATE = 2 * ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
# Bytes that a thread may spill, loads and stores together, in half precision.
MOST_SPILLS = 208
MEASURED_SPILLS = 800  # in gradients of keys with 128 channels, which are fastest so
# Of the update kernels, at once on a multiprocessor.
LEAST_PROGRAMS = {32: 2, 64: 2, 128: 1}


def test_the_gathered_keys_are_copied_asynchronously_and_products_are_fused():
    """In both passes alike, though the first chooses among two streams; with Triton told to round after
    every multiplication, as 3.10 is to do by default."""
    question = 90, "bfloat16", 32, ("forward_local", "forward_same_inst"), True
    ((near, far),) = builds(question, fp_fusion=False)
    for build in (near, far):
        assert build["cp_async"] >= 20 and build["fma"] >= 90 and build["wgmma"] > 0, build
        assert build["spills"] <= MOST_SPILLS and programs_at_once(build, 90) == 4, build
    assert near["cp_async"] == far["cp_async"]


# What the first pass writes, by kernel; besides parts of split blocks.
WRITTEN = {
    "forward_kernel": {"o_ptr", "lse_ptr"},
    "query_gradient_kernel": {"dq_ptr", "stats_ptr"},
    "key_gradient_kernel": {"dk_s_ptr", "dv_s_ptr", "dk_r_ptr", "dv_r_ptr"},
}


def check_overlap(builds, arch):
    """Kernels that an operator launches first read nothing before they wait for what was launched before; the
    others do, and write nothing."""
    for build, name in zip(builds, (*LOCAL, *SAME_INST), strict=True):
        if arch < 90:
            assert build["waits"] == 0, build
        elif name in ("forward_local", "dq_local"):
            assert build["waits"] == 1 and build["reads_ahead"] == 0, build
            # The others read what this one was given: not before that is there. Gradients of keys read what
            # that of queries stores, two numbers for each.
            assert build["starts_next"] == 1 and build["starts_next_ahead"] == 0, build
            assert (build["published"] >= 2) == (name == "dq_local"), build
        else:  # once where it needs what those before it left, and once for programs without work
            assert build["waits"] == 2 and build["reads_ahead"] > 0 == build["writes_ahead"], build
            assert build["starts_next"] == build["starts_next_ahead"] == 1, build
            assert {"q_ptr", "items_ptr", "gathered_ptr"} <= {*build["ahead"]}, build
            assert ("stats_ptr" in build["ahead"]) == (build["kernel"] == "key_gradient_kernel"), build
            assert not {*build["ahead"]} & (WRITTEN[build["kernel"]] | {"partials_ptr", "counters_ptr"}), (
                build
            )


@pytest.mark.builds
@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_attention_with_the_launches_chosen_for_an_architecture(dim, dtype, arch):
    (found,) = builds((arch, dtype, dim, (*LOCAL, *SAME_INST, "summarize"), True), fp_fusion=False)
    update, others = found[: len(UPDATE)], found[len(UPDATE) :]
    assert [build["kernel"] for build in update] == [*UPDATE]
    assert [build["kernel"] for build in others] == ["summarize_kernel", "summarize_gradient_kernel"]
    for build in found:
        assert build["spills"] <= MOST_SPILLS, build
    for build in update:
        assert programs_at_once(build, arch) >= LEAST_PROGRAMS[dim], build
        assert build["fma"] >= 30 and (build["wgmma"] > 0) == (arch == 90), build
    check_overlap(update, arch)
    for build in others:
        assert build["waits"] == (arch >= 90) and (arch < 90 or build["reads_ahead"] == 0), build
    for near, far in zip(update[:3], update[3:]):
        assert near["cp_async"] == far["cp_async"] >= 20, (near, far)


@pytest.mark.builds
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_attention_with_launches_that_were_measured(dim, dtype):
    """What they spill was in their time: at 128 channels that of gradients of keys is more than the rule
    allows."""
    (update,) = builds((90, dtype, dim, (*LOCAL, *SAME_INST)), fp_fusion=False)
    for build in update:
        more = build["kernel"] == "key_gradient_kernel" and dim == 128
        assert build["spills"] <= (MEASURED_SPILLS if more else MOST_SPILLS), build
        assert programs_at_once(build, 90) >= LEAST_PROGRAMS[dim], build
        assert build["fma"] >= 30 and build["wgmma"] > 0 and build["cp_async"] >= 20, build
    check_overlap(update, 90)
    launches = launches_on(gpu_of(90), dim, 2)
    for name, other, near, far in zip(LOCAL, SAME_INST, update[:3], update[3:]):
        alike = getattr(launches, name).num_stages == getattr(launches, other).num_stages
        assert (near["cp_async"] == far["cp_async"]) == alike, (near, far)


@pytest.mark.builds
@pytest.mark.parametrize("arch", GPUS)
def test_what_is_around_the_attention(arch):
    """Norms, RoPE, SwiGLU, embeddings, the bars and the plan."""
    (found,) = builds((arch, "bfloat16", 64, ("around",)))
    assert len(found) >= 17
    for build in found:
        assert build["spills"] == 0, build


@pytest.mark.builds
@pytest.mark.parametrize("arch", [86, 90])
def test_float32(arch):
    """With the largest operands: they fit registers and shared memory, or Triton would have refused."""
    (found,) = builds((arch, "float32", 128, (*LOCAL, "summarize")))
    assert len(found) == 5
