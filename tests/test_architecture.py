"""Which folder may import which, as docs/architecture.md draws it, and that there are no cycles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A folder may import itself, its entry of `ABOVE`, and `BASE`.
BASE = {"errors", "files", "cli", "stop", "streams", ""}  # and the package itself, for its version
ABOVE = {
    "kernels": set(),
    "midi": set(),
    "tokens": {"midi", "kernels"},
    "data": {"tokens", "midi", "kernels"},
    "model": {"tokens", "midi", "kernels"},
    "plots": {"tokens", "midi"},
    "composer": {"tokens", "midi"},
    "checkpoint": {"data", "model", "tokens", "midi", "kernels"},
    "generation": {"checkpoint", "data", "model", "tokens", "midi", "kernels"},
}
ABOVE["training"] = set(ABOVE) | {"training"}
# The same of the folders of benchmarks/ among each other.
BENCHMARKS = {
    "common": set(),
    "songs": set(),
    **{
        folder: {"common", "songs"}
        for folder in ("attention", "training", "learning", "generated", "generating")
    },
}
COMMANDS = {"train", "preprocess", "generate", "export", "demo", "compose"}


def modules(package: str, folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {
    **modules("meloformer", ROOT / "meloformer"),
    **modules("meloformer.kernels", ROOT / "kernels"),
    **modules("benchmarks", ROOT / "benchmarks"),
}


def imports(name: str, path: Path) -> Iterator[str]:
    """The modules that a module imports: at its top, inside functions, or for type checking alone."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if not isinstance(node, ast.ImportFrom):
            continue
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        base = ".".join(filter(None, [base, node.module]))
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


GRAPH = {
    name: {used for used in imports(name, path) if used in MODULES and used != name}
    for name, path in MODULES.items()
}


def folder_of(name: str) -> str:
    """The folder of meloformer/ or benchmarks/ that a module is in, or its own name if it is in none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_there_are_no_import_cycles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for used in sorted(GRAPH[name]):
                visit(used, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())
    assert len(GRAPH) > 100 and sum(map(len, GRAPH.values())) > 200


@pytest.mark.parametrize("folder", ABOVE)
def test_arrows_run_one_way(folder):
    of_folder = [name for name in GRAPH if name.startswith("meloformer.") and folder_of(name) == folder]
    assert of_folder
    for name in of_folder:
        for used in GRAPH[name]:
            assert used.startswith("meloformer"), (name, used)
            assert folder_of(used) in {folder} | ABOVE[folder] | BASE, (name, used)


@pytest.mark.parametrize("folder", BENCHMARKS)
def test_arrows_between_the_folders_of_benchmarks_run_one_way(folder):
    of_folder = [name for name in GRAPH if name.startswith("benchmarks.") and folder_of(name) == folder]
    assert len(of_folder) > 2
    for name in of_folder:
        for used in GRAPH[name]:
            if used.startswith("benchmarks"):
                assert folder_of(used) in {folder} | BENCHMARKS[folder], (name, used)


def test_only_what_runs_a_command_imports_it():
    commands = {f"meloformer.{command}" for command in COMMANDS}
    for name in set(GRAPH) - {"meloformer.demo", "benchmarks.learning.ablation"}:
        assert not GRAPH[name] & commands, name


def test_kernels_know_nothing_of_music():
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "from meloformer" not in text and "import meloformer" not in text, path


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_is_too_long_to_read(name):
    lines = MODULES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 420, f"{len(lines)} lines"
