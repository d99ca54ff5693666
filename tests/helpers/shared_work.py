"""Results that are computed once and shared by all test processes."""

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def once(tmp_path_factory, name: str, make: Callable[[Path], Result]) -> Result:
    """The result of `make`, which one of the test processes of this run calls; the others wait for it.

    Args:
        name: name of the folder that `make` gets and that is kept; unique for each call in the tests.
        make: called with that folder; its result is pickled.
    """
    base = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has a folder below the one of the run.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = folder / "result.pickle"
        if not result.exists():
            result.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(result.read_bytes())
