"""Which backend is chosen, and when: processes without Keras, with and without its settings."""

import json
import os
import sys

import pytest

from tests.processes import result_of, run

pytestmark = pytest.mark.backend_free

# `installed` names the backends that can be found; all others are hidden.
CHOOSE = """
import importlib.util, json, os, sys
installed = sys.argv[1].split(",")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: find("json") if name in installed else None
from puna.backend.select import choose_backend
chosen = choose_backend()
print(json.dumps([chosen, os.environ.get("KERAS_BACKEND"), "keras" in sys.modules]))
"""


# `puna.backend` itself imports Keras, so the file is run without its package.
CHOOSE = CHOOSE.replace(
    "from puna.backend.select import choose_backend",
    "import runpy\nchoose_backend = runpy.run_path('puna/backend/select.py')['choose_backend']",
)


def choose(home, installed, keras_json=None, backend=None):
    """What is returned, the variable afterwards, and whether Keras was imported."""
    if keras_json is not None:
        (home / "keras.json").write_text(keras_json)
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"} | {"KERAS_HOME": str(home)}
    if backend is not None:
        env["KERAS_BACKEND"] = backend
    return result_of(CHOOSE, ",".join(installed), env=env)


def config(backend):
    return json.dumps({"floatx": "float32", "backend": backend})


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (["jax", "torch", "tensorflow"], "jax"),
        (["tensorflow", "torch"], "torch"),
        (["tensorflow"], "tensorflow"),
    ],
)
def test_the_first_of_jax_torch_and_tensorflow_is_taken(tmp_path, installed, expected):
    assert choose(tmp_path, installed) == [expected, expected, False]


def test_the_variable_is_a_choice_even_of_what_is_not_installed(tmp_path):
    assert choose(tmp_path, ["jax"], backend="torch") == [None, "torch", False]


def test_an_empty_variable_is_no_choice(tmp_path):
    assert choose(tmp_path, ["jax"], backend="") == ["jax", "jax", False]


def test_a_keras_json_is_a_choice_of_what_is_installed(tmp_path):
    assert choose(tmp_path, ["jax", "torch"], config("torch")) == [None, None, False]


def test_a_keras_json_of_what_is_not_installed_is_no_choice(tmp_path):
    assert choose(tmp_path, ["jax"], config("tensorflow")) == ["jax", "jax", False]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"backend": 3}', '{"backend": ""}'])
def test_a_keras_json_that_says_nothing_is_no_choice(tmp_path, content):
    assert choose(tmp_path, ["jax", "torch"], content) == ["jax", "jax", False]


def test_without_any_backend_the_error_says_what_to_install(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    done = run(["-c", CHOOSE, "none"], env | {"KERAS_HOME": str(tmp_path)})
    assert done.status == 1
    assert done.last_line == (
        "puna.errors.BackendError: no Keras backend is installed; expected one of jax, torch and "
        "tensorflow. Install one, for example: pip install 'puna[jax]'"
    )


def test_an_imported_keras_has_chosen(tmp_path, monkeypatch):
    from puna.backend import select

    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    assert "keras" in sys.modules
    assert select.choose_backend() is None
    assert "KERAS_BACKEND" not in os.environ
