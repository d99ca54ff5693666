"""Threads that wait sleep while songs are written: OpenMP must be told before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Ends the process where torch would be loaded.
PROBE = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
import {module}
"""


@pytest.mark.parametrize("module", ["meloformer.generate", "meloformer.demo", "benchmarks.generate"])
@pytest.mark.parametrize("chosen, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_is_told_unless_the_user_told_it(module, chosen, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if chosen is None else {"OMP_WAIT_POLICY": chosen}
    code = PROBE.format(module=module)
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout.strip(), done.returncode) == (expected, 0), done.stderr
