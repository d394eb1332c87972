"""Runs that are killed, in processes of their own, and end as if they had not been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from puna.checkpoint.peft import PeftAdapter
from puna.checkpoint.safetensors import SafetensorsSource
from puna.runs import finetune
from puna.runs.checkpoints import TRAINING, Checkpoints, read_state
from puna.runs.lines import JsonLines
from tests.finetuning import tiny_run
from tests.processes import ROOT

# Starting Python and its libraries takes the time here; on one backend it is enough.
pytestmark = pytest.mark.backend_free

SECONDS = 120  # that a process may take


def settings_and_file(directory, **changes):
    """Settings of a run that writes a checkpoint every other step, and a YAML file of them."""
    settings = tiny_run(directory, rows=60, batch_size=2, save_every=2, **changes)
    path = directory / f"{Path(settings.out).name}.yaml"
    path.write_text(yaml.safe_dump(settings.to_dict()))
    return settings, path


def start(config):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "puna", "finetune", "--config", str(config)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(process, metrics, step):
    """Until a step is taken down."""
    end = time.monotonic() + SECONDS
    while not any(line["step"] >= step for line in metrics.read() if "loss" in line):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.001)


def check_all_readable(checkpoints):
    """Each checkpoint opens, and has every number that it says it has."""
    found = checkpoints.all()
    assert found
    for step, path in found.items():
        assert read_state(path)["step"] == step
        source = SafetensorsSource(path / TRAINING)
        assert all(np.isfinite(source.read(name)).all() for name in source.names())
        source.close()
        adapter = PeftAdapter(path)
        for tensors in adapter.modules.values():
            assert all(np.isfinite(adapter.read(name)).all() for name in tensors.values())
        adapter.close()


def steps_of(metrics):
    return {line["step"]: line["loss"] for line in metrics.read() if "loss" in line}


def killed_at_random(directory, times, seed):
    """Kill a run so many times; the losses that it had, and those of one that was let be."""
    unbroken, _ = settings_and_file(directory, out=directory / "unbroken", epochs=3)
    finetune(unbroken)
    expected = steps_of(JsonLines(Path(unbroken.out) / "metrics.jsonl"))
    settings, config = settings_and_file(directory, out=directory / "killed", epochs=3)
    root, numbers = Path(settings.out), random.Random(seed)
    metrics, checkpoints = JsonLines(root / "metrics.jsonl"), Checkpoints(root / "checkpoints")
    # From the third step on there is a checkpoint, if only by a few microseconds.
    for step in sorted(numbers.sample(range(3, len(expected) - 2), times)):
        process = start(config)
        wait_for_step(process, metrics, step)
        time.sleep(numbers.uniform(0.0, 0.01))  # into a step, or into the writing of a checkpoint
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (root / "run.json").exists()
        check_all_readable(checkpoints)
    process = start(config)
    assert process.wait(SECONDS) == 0, process.stderr.read()
    check_all_readable(checkpoints)
    assert not [path for path in checkpoints.directory.iterdir() if path.name.startswith(".")]
    return steps_of(metrics), expected


@pytest.mark.slow
def test_a_run_killed_twice_ends_with_the_same_losses(tmp_path):
    found, expected = killed_at_random(tmp_path, times=2, seed=0)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.soak
def test_a_run_killed_ten_times_ends_with_the_same_losses(tmp_path):
    found, expected = killed_at_random(tmp_path, times=10, seed=1)
    assert list(found) == list(expected)  # a line for each step
    assert found == pytest.approx(expected, abs=1e-5)
    print(f"final loss {found[max(found)]!r}, unbroken {expected[max(expected)]!r}")


@pytest.mark.slow
def test_sigterm_lets_the_step_end_and_says_how_to_go_on(tmp_path):
    settings, config = settings_and_file(tmp_path, epochs=200)
    root, process = Path(settings.out), start(config)
    metrics, checkpoints = JsonLines(root / "metrics.jsonl"), Checkpoints(root / "checkpoints")
    wait_for_step(process, metrics, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, errors
    last = max(steps_of(metrics))
    assert f"puna: stopped after step {last}, with a checkpoint in {root}; the same" in errors
    assert next(reversed(checkpoints.all())) == last
    check_all_readable(checkpoints)
