"""The command line of the fuzzer."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from sparsify_kernels import _registry
from sparsify_kernels.testing.fuzz import CASES, again, fuzz

CHUNK = 1000  # Hypothesis remembers all cases of a run, so as not to repeat one


def main() -> int:
    """Returns 1 after the first failure, which it prints."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsify_kernels.testing.fuzz",
        description="Random cases for the kernels of one backend, each against the reference.",
        allow_abbrev=False,
    )
    parser.add_argument("--cases", type=int, default=2000, help="how many an op (default: %(default)s)")
    parser.add_argument(
        "--op",
        choices=[*CASES],
        action="append",
        help="only this op; may be given again (default: every op that the backend serves)",
    )
    parser.add_argument("--seed", type=int, default=0, help="other cases (default: %(default)s)")
    parser.add_argument("--backend", default="cpp", help="whose kernels (default: %(default)s)")
    parser.add_argument("--case", help="one case, as a failure prints it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is not None:
        again(options.case, backend=options.backend)
        print("passes")
        return 0
    served = [op for op in CASES if options.backend in _registry.implementations(op)]
    if not served:
        parser.error(f"--backend {options.backend}: serves no op here")
    for op in options.op or served:
        begun = time.monotonic()
        for done in range(0, options.cases, CHUNK):
            count = min(CHUNK, options.cases - done)
            try:
                fuzz(op, count, backend=options.backend, start=options.seed + done)
            except AssertionError as error:
                print(error, file=sys.stderr)
                return 1
            print(f"{op}: {done + count} of {options.cases} cases, {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
