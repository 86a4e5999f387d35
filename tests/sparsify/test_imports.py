"""What an import costs and which way imports go."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "torchvision", "timm", "transformers", "av", "accelerate", "numpy", "rich", "matplotlib", "triton"]


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by dotted name, from the source tree."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert found, f"no module of {package} under {ROOT}"
    return found


def imports(name: str, path: Path, deferred: bool) -> Iterator[str]:
    """The names that a module imports: all, or only those that run when it is imported (``deferred=False``)."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{parent}.{base}".rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        skipped = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if deferred or not skipped:
            pending += ast.iter_child_nodes(node)


def loaded_by(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after ``statement``."""
    code = f"import sys; {statement}; print(*(m for m in {[*HEAVY, 'sparsify']!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "sparsify",
        "sparsify.errors",
        "sparsify.config",
        "sparsify.cli",
        "sparsify.data.templates",
        "sparsify.data.music_avqa",
        "sparsify.data.vocabulary",
        "sparsify.data.check",
        "sparsify.report.scores",
    ],
)
def test_light_modules_load_nothing_heavy(module):
    assert loaded_by(f"import {module}") == {"sparsify"}


def test_the_kernels_need_torch_alone():
    loaded = loaded_by("import sparsify_kernels")
    assert "torch" in loaded
    assert not loaded & {"timm", "transformers", "av", "torchvision", "accelerate", "rich", "sparsify"}


def test_the_kernels_never_import_sparsify():
    for name, path in modules("sparsify_kernels").items():
        wrong = [found for found in imports(name, path, deferred=True) if found.split(".")[0] == "sparsify"]
        assert not wrong, f"{name} imports {wrong[0]}"


@pytest.mark.parametrize("package", ["sparsify", "sparsify_kernels"])
def test_no_import_cycles(package):
    known = modules(package)
    needs = {
        name: {found for found in imports(name, path, deferred=False) if found in known and found != name}
        for name, path in known.items()
    }
    # ``from package.module import x`` runs package/__init__.py first, but a module may import its own package's parts.
    needs = {name: {n for n in found if not name.startswith(f"{n}.")} for name, found in needs.items()}
    while needs:
        free = [name for name, found in needs.items() if not found & set(needs)]
        assert free, f"modules that import each other: {', '.join(sorted(needs))}"
        for name in free:
            del needs[name]


def test_the_walk_sees_an_import_cycle_and_a_deferred_import(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom . import b\nimport c.d\n"
        "if TYPE_CHECKING:\n    import e\nclass F:\n    import g\n    def h(self):\n        from ..i import j\n"
    )
    now = {"__future__", "__future__.annotations", "typing", "typing.TYPE_CHECKING", "p.q", "p.q.b", "c.d", "g"}
    assert set(imports("p.q.a", path, deferred=False)) == now
    assert set(imports("p.q.a", path, deferred=True)) == now | {"e", "p.i", "p.i.j"}
