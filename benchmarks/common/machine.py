"""The machine and software of a measurement, part of every result file."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "miditoolkit")


def describe() -> dict[str, object]:
    """Date, commit, Python and package versions, processor and GPU, as JSON values."""
    import torch  # here, so that benchmarks of memory can import this module without it

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def provenance(machine: dict) -> str:
    """What `describe` returned, as the end of a sentence."""
    gpu = machine["gpu"]
    chip = f"{gpu}, CUDA {machine['cuda']}" if gpu else machine["processor"]
    if machine.get("cudnn"):  # older results do not have it
        chip += f", cuDNN {machine['cudnn']}"
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return f"{machine['date']}, commit {machine['commit']}, {chip}, Python {machine['python']}, {packages}"


def _commit() -> str | None:
    """The environment variable GIT_COMMIT, for copies without a repository; else the checked-out commit, with
    '+' if tracked files differ from it; None outside a repository."""
    if named := os.environ.get("GIT_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
