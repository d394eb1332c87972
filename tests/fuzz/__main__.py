"""`make fuzz`: broken and hostile files of every format; each loads, or is refused in one line.

    python -m tests.fuzz                        all formats, 5,000 cases each
    python -m tests.fuzz gguf pth --cases 500   fewer
    python -m tests.fuzz gguf --case 123        one again, in this process; its files are kept

A case is what its format and number make of it, always the same. It fails if it raises anything
but a `PunaError` of one line, crashes, takes more than 2 s, or takes more memory than twice its
files and 32 MB.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from pathlib import Path

from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import HEAD, run


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("formats", nargs="*", choices=[*FORMATS, []], help="all without any")
    parser.add_argument("--cases", type=int, default=5000, help="cases of each format")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--case", type=int, help="run this one only, here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.case is not None:
            return _one(given.formats[0], given.case, Path(scratch))
        failures: list[str] = []
        print(HEAD, flush=True)
        for name in given.formats or FORMATS:
            originals = Path(scratch) / name
            originals.mkdir()
            FORMATS[name].write(originals)
            tally = run(name, originals, given.first, given.first + given.cases)
            print(tally.row(), flush=True)
            print(*tally.failures, sep="\n", end="\n" if tally.failures else "", flush=True)
            failures += tally.failures
    return bool(failures)


def _one(name: str, number: int, originals: Path) -> int:
    case = Path(tempfile.mkdtemp(prefix=f"puna-fuzz-{name}-{number}-"))
    FORMATS[name].write(originals)
    FORMATS[name].mutate(random.Random(f"{name} {number}"), originals, case)
    print(f"{case}:", *(p.relative_to(case).as_posix() for p in case.rglob("*")))
    warnings.simplefilter("ignore")
    FORMATS[name].load(case)
    print("it loads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
