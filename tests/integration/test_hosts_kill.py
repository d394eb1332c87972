"""Runs of two processes of which one is killed: the other ends, and the run can go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from puna.launch import environment, free_address
from puna.runs import finetune
from puna.runs.checkpoints import Checkpoints
from puna.runs.lines import JsonLines
from puna.testing import write_tiny_preset
from tests.finetuning import tiny_run, write_rows
from tests.hosts import DEVICES, LAUNCH, PROCESSES
from tests.integration.test_finetune_kills import check_all_readable, steps_of, wait_for_step
from tests.meshes import SHAPE
from tests.processes import ROOT

pytestmark = [pytest.mark.backend_free, pytest.mark.soak]

SECONDS = 120  # in which all have to end when one is dead
AGAIN = 300  # that the rest of a run may take
FINETUNE = ["-m", "puna", "finetune", "--hosts"]


@pytest.fixture
def runs(tmp_path):
    """A run that was let be, and the settings of one in another directory."""
    write_tiny_preset(tmp_path / "preset", **SHAPE, num_hidden_layers=1)
    write_rows(tmp_path / "train.jsonl", 60)
    unbroken = tiny_run(tmp_path, batch_size=4, save_every=2, epochs=4, out=tmp_path / "unbroken")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(unbroken.to_dict()))
    return unbroken, ["--config", str(config), "--out", str(tmp_path / "killed")], tmp_path


def start(command, env=None):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=(env or os.environ) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def process_of(launcher, index):
    """The pid of one of the processes that a launcher has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    wanted = f"KERAS_DISTRIBUTION_PROCESS_ID={index}".encode()
    [found] = [c for c in children if wanted in Path(f"/proc/{c}/environ").read_bytes()]
    return int(found)


def check_the_end(settings, root):
    """It has the losses of the run that was let be."""
    finetune(settings)
    expected = steps_of(JsonLines(Path(settings.out) / "metrics.jsonl"))
    found = steps_of(JsonLines(root / "metrics.jsonl"))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("index", range(PROCESSES))
def test_the_launcher_ends_the_others_and_the_run_goes_on_on_another_mesh(runs, index):
    settings, options, folder = runs
    root = folder / "killed"
    metrics, checkpoints = JsonLines(root / "metrics.jsonl"), Checkpoints(root / "checkpoints")
    launcher = start([*LAUNCH, *FINETUNE, "--mesh", "2x4", *options])
    wait_for_step(launcher, metrics, 5)
    os.kill(process_of(launcher, index), signal.SIGKILL)
    begun = time.monotonic()
    _, errors = launcher.communicate(timeout=SECONDS)
    print(f"ended {time.monotonic() - begun:.1f} s after process {index} was killed")
    assert launcher.returncode == 128 + signal.SIGKILL
    assert f"process {index} was ended by SIGKILL; ending the other 1" in errors
    assert not (root / "run.json").exists()
    check_all_readable(checkpoints)
    launcher = start([*LAUNCH, *FINETUNE, "--mesh", "1x8", *options])
    _, errors = launcher.communicate(timeout=AGAIN)
    assert launcher.returncode == 0, errors
    assert "Going on after step" in errors
    check_the_end(settings, root)


@pytest.mark.parametrize("index", range(PROCESSES))
def test_without_the_launcher_the_others_end_by_themselves(runs, index):
    _, options, folder = runs
    root, address = folder / "killed", free_address()
    metrics, checkpoints = JsonLines(root / "metrics.jsonl"), Checkpoints(root / "checkpoints")
    command = [*FINETUNE, "--mesh", "1x8", *options, "--epochs", "400"]
    both = [start(command, environment(address, PROCESSES, i, DEVICES)) for i in range(PROCESSES)]
    wait_for_step(both[0], metrics, 5)
    both[index].kill()
    begun = time.monotonic()
    both[1 - index].communicate(timeout=SECONDS)
    print(f"ended {time.monotonic() - begun:.1f} s after process {index} was killed")
    assert both[1 - index].returncode != 0
    both[index].communicate()
    check_all_readable(checkpoints)


def test_sigterm_lets_the_step_end_in_all_processes(runs):
    settings, options, folder = runs
    root = folder / "killed"
    metrics, checkpoints = JsonLines(root / "metrics.jsonl"), Checkpoints(root / "checkpoints")
    launcher = start([*LAUNCH, *FINETUNE, "--mesh", "2x4", *options])
    wait_for_step(launcher, metrics, 3)
    os.kill(process_of(launcher, 1), signal.SIGTERM)  # one hears of it, and all stop
    _, errors = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 130, errors
    last = max(steps_of(metrics))
    assert f"stopped after step {last}, with a checkpoint in {root}; the same" in errors
    assert next(reversed(checkpoints.all())) == last
    check_all_readable(checkpoints)
    launcher = start([*LAUNCH, *FINETUNE, "--mesh", "4x2", *options])
    _, errors = launcher.communicate(timeout=AGAIN)
    assert launcher.returncode == 0, errors
    check_the_end(settings, root)
