"""`pytest benchmarks`, as far as a CPU can run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure at full length")
def test_pytest_benchmarks_run_on_cpu():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    # A test process is a worker of pytest-xdist: the new one is not.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-k", "small-256-batch1 or base-2048"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b7 passed, 35 skipped", done.stdout), done.stdout
    assert "needs a CUDA device" in done.stdout
    measured = set(re.findall(r"^(test_\w+)\[", done.stdout, re.M))
    assert measured == {"test_plan", "test_forward", "test_backward", "test_forward_and_backward"}
