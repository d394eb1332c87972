"""`python -m puna.launch`: several processes of one program on this machine.

    python -m puna.launch --processes 2 --cpu-devices 4 train.py --epochs 3
    python -m puna.launch --processes 2 -m puna finetune --hosts --mesh 2x4 ...

It is for trying out on one machine what is to run on several, where SLURM, Kubernetes or the TPU
pod starts the processes; see `docs/hosts.md`. The program calls `puna.distribution.initialize()`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

_GRACE = 5.0  # seconds from SIGTERM to SIGKILL: without the others, none can do anything
# What JAX's CPU collectives print of each connection; several of them at once, perhaps mixed up.
_NOISE = ("[Gloo]", "peer ranks")


class Processes:
    """Processes of one program, that end together.

    Args:
        command: the program and its arguments.
        count: how many there shall be.
        cpu_devices: how many devices each makes of its CPU; None leaves devices as they are.
    """

    def __init__(self, command: Sequence[str], count: int, cpu_devices: int | None = None):
        self._printing = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        address = free_address()
        for index in range(count):
            process = subprocess.Popen(
                command,
                env=environment(address, count, index, cpu_devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C comes to all of them through us
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            self._processes.append(process)
        # Only now, as a process with threads must not do anything between fork and exec.
        for index, process in enumerate(self._processes):
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                assert source is not None
                reader = threading.Thread(target=self._copy, args=(index, source, target))
                reader.start()
                self._readers.append(reader)

    def signal(self, number: int) -> None:
        """Send a signal to those that run."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end of all; where one ends badly, end the others.

        Returns:
            0, or the exit status of the one that was first to end badly.
        """
        status = 0
        while running := [p for p in self._processes if p.poll() is None]:
            bad = [i for i, p in enumerate(self._processes) if p.poll()]
            if bad:
                status = self._processes[bad[0]].returncode
                self._end(bad[0], running)
                break
            time.sleep(0.05)
        for reader in self._readers:
            reader.join()
        if not status:
            bad = [i for i, p in enumerate(self._processes) if p.returncode]
            if bad:
                status = self._processes[bad[0]].returncode
                self._tell(f"process {bad[0]} {_how(status)}")
        return 128 - status if status < 0 else status

    def _end(self, bad: int, running: list[subprocess.Popen[str]]) -> None:
        how = _how(self._processes[bad].returncode)
        self._tell(f"process {bad} {how}; ending the other {len(running)}, which would wait for it")
        self.signal(signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _copy(self, index: int, source: IO[str], target: IO[str]) -> None:
        for line in source:
            if not any(words in line for words in _NOISE):
                with self._printing:
                    target.write(f"[{index}] {line.rstrip()}\n")
                    target.flush()

    def _tell(self, text: str) -> None:
        with self._printing:
            print(f"puna.launch: {text}", file=sys.stderr, flush=True)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _end_with_parent() -> None:
    """Have the system kill this process when the launcher is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h


def free_address() -> str:
    """An address of this machine at which process 0 can be reached by the others."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def environment(
    address: str, count: int, index: int, cpu_devices: int | None = None
) -> dict[str, str]:
    """The environment of one of the processes, for `puna.distribution.initialize`.

    Args:
        address: of process 0.
        count: how many processes there are.
        index: which of them it is.
        cpu_devices: how many devices it makes of its CPU; None leaves devices as they are.
    """
    found = os.environ | {
        "KERAS_BACKEND": "jax",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
        "KERAS_DISTRIBUTION_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if cpu_devices is not None:
        flags = f"--xla_force_host_platform_device_count={cpu_devices}"
        found["JAX_PLATFORMS"] = "cpu"
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; see this module.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m puna.launch",
        description="Run a program in several processes of this machine, which end together.",
    )
    parser.add_argument("--processes", type=_positive, required=True, help="how many")
    parser.add_argument(
        "--cpu-devices", type=_positive, help="make so many devices of the CPU in each"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="a Python file, or a module's name")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what it is given")
    given = parser.parse_args(arguments)
    program = ["-m", given.program] if given.module else [given.program]
    command = [sys.executable, *program, *given.arguments]
    processes = Processes(command, given.processes, given.cpu_devices)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: processes.signal(number))
    return processes.wait()


if __name__ == "__main__":
    sys.exit(main())
