"""What is to be seen of a model on two processes with four devices each, for tests.

`seen("parity", ...)` runs the functions of those names, of `host_runs` or else of `mesh_runs`, in
two processes of their own that `puna.launch` starts, and returns what they return in each.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from tests.processes import run

PROCESSES, DEVICES = 2, 4
LAUNCH = ["-m", "puna.launch", "--processes", str(PROCESSES), "--cpu-devices", str(DEVICES)]


def seen(*names: str) -> list[dict[str, Any]]:
    """What the functions of these names return in each process."""
    done = run([*LAUNCH, "-m", "tests.hosts", *names])
    assert done.status == 0, f"the program failed:\n{done.out}\n{done.err}"
    lines = [line for line in done.out.splitlines() if "{" in line]
    return [json.loads(line.partition("] ")[2]) for line in sorted(lines)[-PROCESSES:]]


def main(names: list[str]) -> None:
    """Run functions of those modules, and print what they return as JSON."""
    from puna import distribution
    from tests import host_runs, mesh_runs

    warnings.simplefilter("ignore")
    distribution.initialize()
    there = vars(mesh_runs) | vars(host_runs)
    print(json.dumps({name: there[name]() for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
