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


@pytest.mark.builds
def test_kernels_fit_a_hopper_gpu(tmp_path):
    """Of the base model in bfloat16, alone and for 64 songs."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, str(BUILD), "1,64", "bfloat16"], env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    built = [json.loads(line) for line in run.stdout.splitlines()]
    products = ("project_kernel", "attended_kernel", "gate_kernel", "down_kernel", "head_kernel")
    assert [build["kernel"] for build in built] == [
        kernel
        for attend in ("attend_kernel", "attend_evenly_kernel")
        for kernel in (
            *("read_kernel", "list_kernel", "project_kernel", attend, "attended_kernel"),
            *("gate_kernel", "down_kernel", "head_kernel", "draw_kernel"),
        )
    ]
    one, many = built[: len(built) // 2], built[len(built) // 2 :]  # songs
    for build in built:
        assert build["shared"] <= SHARED, build
    for build in many:
        assert build["waits"] == 0, build
        if build["kernel"] in products:  # weights are on their way while others are multiplied
            assert build["cp_async"] and build["mma"], build
    for build in one:
        # Launches overlap: a program loads its weights before it waits for what they are multiplied with.
        assert build["waits"] == 1, build
        if build["kernel"] in products:
            assert build["ahead"] > 0 and not build["mma"], build
