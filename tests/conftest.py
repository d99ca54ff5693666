import os
import sys
from pathlib import Path

# Two test processes on two cores: more threads would only wait for each other. Inherited by commands.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # helpers beside the tests; meloformer and benchmarks

# Triton decides when a kernel is defined whether it is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
