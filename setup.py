"""Builds csrc/ into sparsify_kernels, and nothing else; pyproject.toml says the rest.

Without torch, without a compiler or when the build fails, the package installs pure, says why (on stderr, and later
in ``backend_info()``) and works. ``SPARSIFY_REQUIRE_EXT=1`` makes that an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_builder() -> ModuleType:
    """sparsify_kernels/_build.py by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("sparsify_kernels_build", ROOT / "sparsify_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


builder = load_builder()


class BuildPy(build_py):
    """Ships the C++ sources inside an install, so that ``python -m sparsify_kernels.build`` has them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "sparsify_kernels" / "_csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


class BuildKernels(build_ext):
    """One step for both modules; a failure leaves its reason where the modules would be."""

    def run(self) -> None:
        package = ROOT / "sparsify_kernels" if self.inplace else Path(self.build_lib) / "sparsify_kernels"
        why = package / builder.WHY_PURE
        why.unlink(missing_ok=True)
        try:
            builder.build(package, Path(self.build_temp).resolve() / "sparsify")
        except builder.BuildError as error:
            if os.environ.get("SPARSIFY_REQUIRE_EXT") == "1":
                raise SystemExit(f"sparsify_kernels: SPARSIFY_REQUIRE_EXT=1, and not built: {error}") from None
            package.mkdir(parents=True, exist_ok=True)
            why.write_text(str(error) + "\n", encoding="utf-8")
            print(f"sparsify_kernels: installing in pure Python: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was really built: none of it, perhaps."""
        package = Path(self.build_lib) / "sparsify_kernels"
        return [str(path) for path in (*package.glob("*.so"), package / builder.WHY_PURE) if path.exists()]


setup(
    # Declared so that a wheel is tagged with its platform; BuildKernels knows the sources.
    ext_modules=[Extension("sparsify_kernels._C", sources=[], optional=True)],
    cmdclass={"build_py": BuildPy, "build_ext": BuildKernels},
)
