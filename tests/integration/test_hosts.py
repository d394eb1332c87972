"""A model on two processes does what it does in one; see `tests/hosts.py`."""

import json
import os

import keras
import pytest

from puna import distribution
from puna.errors import BackendError
from tests.hosts import seen
from tests.integration.test_model_parallel import close
from tests.meshes import MESHES
from tests.processes import run

# The processes have JAX's devices, whatever the tests run on.
pytestmark = [pytest.mark.backend_free, pytest.mark.slow]


@pytest.fixture(scope="module")
def quick():
    """What is seen in one go, as starting two processes takes its time."""
    return seen("parity", "loading", "gathering", "saving", "refused")


def test_logits_tokens_loss_and_gradients_are_those_of_one_device(quick):
    for process in quick:
        close(process["parity"]["(2, 4)"])


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["elsewhere", "lora", "int8", "int4"])
def test_they_are_on_all_meshes(kind):
    for process in seen(f"parity_{kind}"):
        for mesh in process[f"parity_{kind}"].values():
            close(mesh)


# Rows


@pytest.mark.soak
def test_rows_are_shared_out_over_the_processes_and_count_the_same():
    for process in seen("fitting"):
        found = process["fitting"]
        for mesh in ("(8, 1)", "(2, 4)"):
            assert found[mesh]["rows"] == 5
            assert found[mesh]["apart"] <= 1e-3  # of logits after training
            for name, wanted in found["wanted"].items():
                assert found[mesh]["losses"][name] == pytest.approx(wanted, abs=1e-4), name


@pytest.mark.soak
def test_each_process_may_have_rows_of_its_own():
    for process in seen("own_rows"):
        found = process["own_rows"]
        for mesh in ("(8, 1)", "(2, 4)"):
            assert found[mesh]["losses"] == pytest.approx(found["wanted"], abs=1e-4)
            assert found[mesh]["apart"] <= 1e-4
        assert "the shapes of a batch are not the same in all processes" in found["unlike"]


# Files


@pytest.mark.parametrize("mesh", MESHES)
def test_each_process_reads_its_own_shards_and_nothing_else(quick, mesh):
    reads = []
    for process in quick:
        found = process["loading"][str(mesh)]
        assert found["processes"] == 2
        assert found["read"] == found["share"]
        assert found["put"] == found["held"]
        assert found["same"]
        reads.append(found["read"] / found["all"])
    # Four devices have all of the weights, unless it takes eight; norms are whole on each.
    assert reads == pytest.approx([0.5 if mesh == (1, 8) else 1.0] * 2, rel=0.01)


def test_what_is_gathered_comes_in_pieces(quick):
    for process in quick:
        found = process["gathering"].values()
        assert all(one["same"] for one in found)
        assert max(one["sent"] for one in found) == 1024


def check_saved(found, kinds):
    for kind in kinds:
        assert found[kind], kind
        assert found[f"{kind} files"] >= 8
    for case, words in (("a file", "is a file; expected"), ("no directory", "cannot be written")):
        assert words in found[case][1]


def test_what_is_saved_is_what_one_process_saves(quick):
    for process in quick:
        check_saved(process["saving"], ["lora"])
    for case in ("a file", "no directory", "disk full"):
        first, other = (process["saving"][case] for process in quick)
        assert first[0] == "PresetError"
        assert other == ["HostError", f"process 0 has failed: {first[1]}"]
    first, _ = (process["saving"] for process in quick)
    assert first["another broken"][0] == "HostError"
    assert "process 1 has failed: [Errno 28] No space" in first["another broken"][1]
    assert first["disk full unchanged"]
    assert first["another broken unchanged"]


@pytest.mark.soak
def test_so_is_it_of_other_models_on_other_meshes():
    for process in seen("saving_elsewhere"):
        check_saved(process["saving_elsewhere"], ["plain", "int4", "lora"])


# What cannot be


def test_other_backends_are_refused():
    if keras.backend.backend() != "jax":
        with pytest.raises(BackendError, match="KERAS_BACKEND=jax"):
            distribution.initialize()
    assert distribution.is_first_process()


INITIALIZE = """
import json, os, sys
import puna
for given in json.loads(sys.argv[1]):
    os.environ.update(given)
    try:
        puna.distribution.initialize()
    except puna.errors.ConfigError as error:
        print(error)
"""


def test_a_process_that_does_not_know_the_others_says_what_to_do():
    names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    address, count, index = (f"KERAS_DISTRIBUTION_{name}" for name in names)
    cases = [{}, {count: "two"}, {count: "2", index: "2", address: "127.0.0.1:1"}]
    env = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = run(["-c", INITIALIZE, json.dumps(cases)], env)
    assert done.status == 0, done.err
    none, two, outside = done.out.splitlines()
    for words in ("coordinator_address", "python -m puna.launch", "srun", address, count, index):
        assert words in none
    assert f"{count} is 'two'; expected a whole number" in two
    assert "process_id < num_processes" in outside


def test_processes_without_a_mesh_or_without_devices_are_refused(quick):
    for process in quick:
        found = process["refused"]
        assert "there are 2 processes and no mesh" in found["no mesh"]
        words = "(1, 4) has devices of theirs: 4 of process 0; expected as many of each"
        assert words in found["one process"]
        assert "call puna.distribution.initialize() once" in found["twice"]
