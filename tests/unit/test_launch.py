"""`python -m puna.launch`: processes that end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT, run

pytestmark = pytest.mark.backend_free

SECONDS = 30  # that anything here may take
INDEX = 'import os, sys, time; index = int(os.environ["KERAS_DISTRIBUTION_PROCESS_ID"])\n'


@pytest.fixture
def launched(tmp_path):
    """Runs a program in two processes; `index` is which of them it is."""

    def launched(code, *arguments):
        program = tmp_path / "program.py"
        program.write_text(INDEX + code)
        return run(["-m", "puna.launch", "--processes", "2", str(program), *arguments])

    return launched


def test_each_process_knows_the_others_and_says_which_one_speaks(launched):
    code = """
for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID"):
    print(os.environ[f"KERAS_DISTRIBUTION_{name}"])
print("[Gloo] Rank [Gloo] Rank 0 is connected to 1\\n is connected to 1 peer ranks")
print(*sys.argv[1:], file=sys.stderr)
"""
    done = launched(code, "--rows", "5")
    assert done.status == 0
    said = done.out.splitlines()
    lines = {i: [line[4:] for line in said if line.startswith(f"[{i}] ")] for i in (0, 1)}
    assert lines[0][0] == lines[1][0]
    assert lines[0][0].startswith("127.0.0.1:")
    assert [lines[0][1:], lines[1][1:]] == [["2", "0"], ["2", "1"]]
    assert sorted(done.err.splitlines()) == ["[0] --rows 5", "[1] --rows 5"]


def test_a_module_is_started_and_the_cpu_made_several_devices():
    code = ["--cpu-devices", "3", "-m", "tests.unit.launched_module", "-x"]
    done = run(["-m", "puna.launch", "--processes", "2", *code])
    assert done.status == 0, done.err
    assert done.out.count("device_count=3 -x\n") == 2


@pytest.mark.parametrize("bad", [0, 1])
def test_when_one_is_killed_the_other_ends_and_why_is_told(launched, bad):
    begun = time.monotonic()
    done = launched(f"if index == {bad}: os.kill(os.getpid(), 9)\ntime.sleep({SECONDS})")
    assert done.status == 128 + signal.SIGKILL
    assert f"process {bad} was ended by SIGKILL; ending the other 1" in done.err
    assert time.monotonic() - begun < SECONDS / 2


def test_the_exit_status_is_that_of_the_first_to_fail(launched):
    done = launched(f"if index: sys.exit(3)\ntime.sleep({SECONDS})")
    assert done.status == 3
    assert "process 1 ended with exit status 3" in done.err


def test_one_that_ignores_sigterm_is_killed(launched):
    code = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(__file__ + str(index), "w").close()
while not all(os.path.exists(__file__ + i) for i in "01"): time.sleep(0.01)
if index: sys.exit(1)
time.sleep({SECONDS})
"""
    begun = time.monotonic()
    assert launched(code).status == 1
    assert time.monotonic() - begun < SECONDS / 2


def started(program):
    """Two processes of a program, and what they print."""
    process = subprocess.Popen(
        [sys.executable, "-m", "puna.launch", "--processes", "2", str(program)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(tmp_path, number):
    program = tmp_path / "program.py"
    program.write_text(
        INDEX
        + f"""
import signal
def heard(number, frame):
    print("heard", number)
    sys.exit(0)
signal.signal({int(number)}, heard)
print("ready")
time.sleep({SECONDS})
"""
    )
    process, lines = started(program)
    assert sorted(lines.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == [f"[{i}] heard {int(number)}" for i in (0, 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_none_outlives_a_launcher_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(INDEX + f"print(os.getpid(), flush=True)\ntime.sleep({SECONDS})")
    process, lines = started(program)
    pids = [int(lines.readline()[4:]) for _ in range(2)]
    process.kill()
    process.communicate()
    end = time.monotonic() + SECONDS / 2
    while any(map(runs, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("arguments", [["--processes", "0", "x.py"], ["--processes", "2"]])
def test_wrong_usage_is_told(arguments):
    done = run(["-m", "puna.launch", *arguments])
    assert done.status == 2
    assert "usage: python -m puna.launch" in done.err
