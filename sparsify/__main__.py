"""``python -m sparsify`` is the ``sparsify`` command."""

from __future__ import annotations

import sys

from sparsify.cli import main

if __name__ == "__main__":
    sys.exit(main())
