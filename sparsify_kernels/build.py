"""``python -m sparsify_kernels.build`` compiles the CPU kernels in place, after a pure install too."""

from __future__ import annotations

import sys

from sparsify_kernels._build import PACKAGE, WHY_PURE, BuildError, build

__all__ = ["main"]


def main() -> int:
    """Returns 0 when the kernels are built, 1 with the reason when not."""
    try:
        written = build(PACKAGE)
    except BuildError as error:
        print(f"sparsify_kernels: not built: {error}", file=sys.stderr)
        return 1
    (PACKAGE / WHY_PURE).unlink(missing_ok=True)
    for path in written:
        print(f"built {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
