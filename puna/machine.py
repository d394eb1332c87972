"""What the machine offers this process, and what the process takes of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")  # Linux's account of this process


def usable_cores() -> int:
    """Cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable is not None else os.cpu_count() or 1


def resident_memory() -> int | None:
    """Bytes of memory that this process holds; None where the system does not tell."""
    return _status("VmRSS")


def peak_memory() -> int | None:
    """Bytes of memory that this process has held at the most; None where it is not told."""
    found = _status("VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:
        return None
    # macOS counts bytes here, every other system kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe() -> dict[str, Any]:
    """The processor, and how much of it may be used."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    system = f"{platform.system()} {platform.release()}"
    return {"cpu": cpu, "cores": usable_cores(), "system": system}


def versions(backend: str) -> dict[str, str]:
    """The versions of Python, of this package and of what it computes with.

    Args:
        backend: the Keras backend's library, which is imported.
    """
    found = {"python": platform.python_version()}
    for package in ("puna", "keras", "numpy"):
        found[package] = importlib.metadata.version(package)
    # Its package may have another name, such as tensorflow-cpu.
    found[backend] = str(getattr(sys.modules.get(backend), "__version__", "unknown"))
    return found


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(field)]
    return int(found[0]) * 1024 if found else None
