"""`kernels/` is `meloformer.kernels` everywhere, and the other distribution `kernels` stays itself."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
OURS = sorted(path.name for path in (CHECKOUT / "kernels").glob("*.py"))


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """What `code` prints in a fresh interpreter that sees `path` before the installed packages."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def add_other_distribution(site: Path) -> Path:
    """A stand-in for the distribution that owns the import name `kernels`, with modules named as ours."""
    package = site / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("OWNER = 'the other one'\n")
    for name in OURS:
        (package / name).write_text("raise ImportError('meloformer took the other distribution')\n")
    return site


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="70.1")  # from there on it builds wheels by itself
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("kernels", "meloformer", "benchmarks", "tests"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", str(folder), "."],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def site(wheel, tmp_path) -> Path:
    """A folder with the wheel unpacked and the other distribution beside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return add_other_distribution(tmp_path / "site")


@pytest.mark.slow
def test_wheel_holds_meloformer_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert "meloformer" in tops and len(tops) == 2
    assert (tops - {"meloformer"}).pop().endswith(".dist-info")
    kernels = {name for name in names if name.startswith("meloformer/kernels/")}
    assert kernels == {f"meloformer/kernels/{name}" for name in ["__init__.py", *OURS]}
    modules = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "meloformer").rglob("*.py")}
    assert modules <= set(names)


@pytest.mark.slow
def test_installed_wheel_beside_the_other_kernels(site, tmp_path):
    code = "import kernels, meloformer.kernels.structure as s; print(kernels.OWNER); print(s.__file__)"
    owner, file = run_python(code, tmp_path, site).splitlines()
    assert owner == "the other one"
    assert Path(file) == site / "meloformer" / "kernels" / "structure.py"


@pytest.mark.slow
def test_every_module_of_the_wheel_imports_beside_the_other_kernels(site, tmp_path):
    """The tools of the machine learning stack look for `kernels` too; ours must not answer."""
    code = (
        "import importlib, pkgutil, meloformer\n"
        "for m in pkgutil.walk_packages(meloformer.__path__, 'meloformer.'):\n"
        "    importlib.import_module(m.name)\n"
        "    print(m.name)\n"
    )
    imported = run_python(code, tmp_path, site).split()
    assert {f"meloformer.kernels.{Path(name).stem}" for name in OURS} <= set(imported)


@pytest.mark.parametrize("cwd_is_checkout", [True, False], ids=["cwd", "path"])
def test_plain_checkout(tmp_path, cwd_is_checkout):
    code = "import meloformer.kernels.structure as s; print(s.__file__)"
    cwd = CHECKOUT if cwd_is_checkout else tmp_path
    file = run_python(code, cwd, CHECKOUT)
    assert Path(file) == CHECKOUT / "kernels" / "structure.py"


def test_plain_checkout_beside_the_other_kernels(tmp_path):
    """The checkout is the first entry of sys.path, and still `kernels` is the other distribution."""
    site = add_other_distribution(tmp_path / "site")
    code = "import kernels, meloformer.kernels.structure as s; print(kernels.OWNER); print(s.__file__)"
    owner, file = run_python(code, CHECKOUT, site).splitlines()
    assert owner == "the other one"
    assert Path(file) == CHECKOUT / "kernels" / "structure.py"


def test_the_folder_of_kernels_is_no_package():
    """An `__init__.py` there would make every checkout shadow the other distribution."""
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()


def test_commands_start_in_a_plain_checkout():
    done = subprocess.run(
        [sys.executable, "-m", "meloformer.compose", "--help"],
        cwd=CHECKOUT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--count" in done.stdout
