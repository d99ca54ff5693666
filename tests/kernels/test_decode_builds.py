"""That the kernels of a decoding step can be built for a Hopper GPU, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BUILD = Path(__file__).resolve().parents[1] / "helpers" / "build_decode.py"
SHARED = 99 * 1024  # bytes that a program can have on the smallest GPUs; on an H100 it is 227


def built(folder: Path, *arguments: str) -> list[dict]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(BUILD), *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.builds
def test_keys_of_8_bits_are_converted_by_instructions(tmp_path):
    with_keys = {"project_kernel", "attend_evenly_kernel", "attended_kernel"}
    for build in built(tmp_path, "64", "bfloat16", "float8_e4m3fn"):
        assert (build["float8"] > 0) == (build["kernel"] in with_keys), build
        assert build["shared"] <= SHARED, build
        if build["kernel"] == "attend_evenly_kernel":
            assert build["mma"] and not build["wgmma"], build
            # Else keys are loaded where they are needed, byte by byte.
            assert build["reads_ahead"] < 32, build
            # Values come as operands from shared memory: read in parts, four threads wait for one bank.
            assert build["transposed"] == 8, build


# What a kernel for one song reads before it waits for the one before: weights, and what was written by others
# before that one, which has waited for them before it let this one start. By argument, and in brackets what
# addresses and masks depend on: keys that the kernel before writes must be left out.
AHEAD = {
    "read_kernel": {
        "reader_ptr": [],
        "places_ptr": ["reader_ptr"],
        "last_ptr": [],
        "labels_ptr": ["reader_ptr"],
    },
    "list_kernel": {"group_ptr": [], "count_ptr": []},
    "project_kernel": {"w_r_ptr": []},
    "attend_kernel": {
        "count_ptr": [],
        "place_ptr": [],
        "list_ptr": ["count_ptr"],
        "keys_ptr": ["count_ptr", "list_ptr", "place_ptr"],
    },
    "attended_kernel": {"w_r_ptr": []},
    "gate_kernel": {"w_ptr": []},
    "down_kernel": {"w_ptr": []},
    "head_kernel": {"w_ptr": [], "gates_ptr": []},
}
WRITTEN_BEFORE_DRAW = {"logits_ptr", "position_ptr", "bars_ptr"}  # by `head`, or read where it is too late


@pytest.mark.builds
@pytest.mark.parametrize("cache_dtype", [(), ("float8_e4m3fn",)], ids=["", "8 bits"])
def test_kernels_of_one_song_wait_with_all_done_that_can_be(cache_dtype, tmp_path):
    builds = built(tmp_path, "1", "bfloat16", *cache_dtype)
    assert {build["kernel"] for build in builds} == {*AHEAD, "draw_kernel"}
    for build in builds:
        kernel = build["kernel"]
        assert build["writes_ahead"] == 0 == build["spills"] and build["shared"] <= SHARED, build
        if kernel == "draw_kernel":
            assert {"grammar_ptr", "draft_ptr", "within_ptr", "mode_ptr"} <= {*build["ahead"]}
            assert not WRITTEN_BEFORE_DRAW & {*build["ahead"]}, build
        else:
            assert build["ahead"] == AHEAD[kernel], build
        # Whoever starts one that reads ahead must have waited for who wrote that: keys before `attend`, the
        # song before `draw` and `read` (and before `list`, behind `read`).
        waits_first = kernel in ("project_kernel", "head_kernel", "draw_kernel")
        assert build["waits"] == 1 and build["starts_next_ahead"] == (not waits_first), build
        assert build["mma"] == 0, build


@pytest.mark.builds
def test_kernels_fit_a_hopper_gpu(tmp_path):
    """Of the base model in bfloat16, alone and for 64 songs."""
    builds = built(tmp_path, "1,64", "bfloat16")
    products = ("project_kernel", "attended_kernel", "gate_kernel", "down_kernel", "head_kernel")
    assert [build["kernel"] for build in builds] == [
        kernel
        for attend in ("attend_kernel", "attend_evenly_kernel")
        for kernel in (
            *("read_kernel", "list_kernel", "project_kernel", attend, "attended_kernel"),
            *("gate_kernel", "down_kernel", "head_kernel", "draw_kernel"),
        )
    ]
    for build in builds:
        assert build["shared"] <= SHARED, build
    for build in builds[len(builds) // 2 :]:  # of 64 songs
        # Launches overlap late: what lets the next one start comes behind the wait.
        assert build["waits"] == 1 and build["starts_next_ahead"] == 0, build
        assert build["wgmma"] == 0, build  # by these, products of 64 rows were wrong on an H200
        if build["kernel"] in products:  # weights are on their way while others are multiplied
            assert build["cp_async"] and build["mma"], build
