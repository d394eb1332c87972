"""Runs cases in a process of its own: `python -m tests.fuzz.worker FORMAT ORIGINALS FROM TO`.

It writes a line when a case begins and one when it ends, so that whoever reads knows which case was
running when the process died or went silent.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from puna.errors import PunaError
from tests.fuzz.formats import FORMATS, Format

ROOM = 512 << 20  # bytes of address space that a case may take: beyond it an allocation fails


def status(field: str) -> int:
    """A number of bytes from Linux's /proc/self/status."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_case(form: Format, originals: Path, number: int, scratch: Path) -> dict[str, object]:
    """Break a file as the case's number says, load it, and say what came of it."""
    case = scratch / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    form.mutate(random.Random(f"{form.name} {number}"), originals, case)
    size = sum(file.stat().st_size for file in case.rglob("*") if file.is_file())
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    outcome, what = "loaded", ""
    try:
        form.load(case)
    except PunaError as error:
        outcome, what = "refused", str(error)
        if "\n" in what or not what.strip():
            outcome = "not one line"
    except BaseException as error:  # panics of Rust are no Exceptions
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = "exception"
        what = f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"
    return {
        "case": number,
        "outcome": outcome,
        "what": what,
        "size": size,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": max(0, status("VmHWM") - before),
    }


def main() -> None:
    """Run the cases that the command line names."""
    name, originals, first, end = sys.argv[1:]
    form = FORMATS[name]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        shutil.copytree(originals, whole)
        form.load(whole)  # what is not broken loads; and imports at first use are not a case's
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM, hard))
        for number in range(int(first), int(end)):
            print(json.dumps({"begins": number}), flush=True)
            print(json.dumps(run_case(form, Path(originals), number, Path(scratch))), flush=True)


if __name__ == "__main__":
    main()
