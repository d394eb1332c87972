"""What is imported, and what is not: no TensorFlow in the house unless it is the chosen backend."""

import os

import pytest

from puna.testing import write_tiny_preset
from tests.processes import result_of

pytestmark = pytest.mark.backend_free

# Everything that the first part of Puna does, in one process; the last line says what it saw.
TOUR = """
import json, sys
import puna
import puna.testing
directory = sys.argv[1]
model = puna.models.CausalLM.from_preset(directory)
model.generate(["Hello", "Hi there you"], max_new_tokens=3)
model.generate("Hello", max_new_tokens=2, sampler="top_p")
chat = puna.ChatState(model, system="Hi", max_new_tokens=2)
chat.send_message("Hello")
history = model.fit(["Hello world", "Hi"], batch_size=2, verbose=0)
model.evaluate(["Hello"], verbose=0)
model.predict(["Hello"], verbose=0)
model.summary(print_fn=lambda text: None)
model.save_to_preset(directory + "/saved")
again = puna.models.Llama3CausalLM.from_preset(directory + "/saved", dtype="bfloat16")
again.generate("Hello", max_new_tokens=2)
import keras
print(json.dumps({
    "backend": keras.backend.backend(),
    "loss": history.history["loss"][0],
    "foreign": sorted({"torch", "tensorflow", "transformers"} & set(sys.modules)),
}))
"""

# Makes torch and TensorFlow look as if they were not installed.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "tensorflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.partition(".")[0] in ("torch", "tensorflow") else find(name, package)
importlib.util.find_spec = find_spec
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_tiny_preset(tmp_path_factory.mktemp("preset") / "tiny")


def environment(home, **more):
    env = {k: v for k, v in os.environ.items() if not k.startswith("KERAS_")}
    return env | {"KERAS_HOME": str(home), **more}


@pytest.mark.slow
def test_a_whole_tour_on_jax_imports_neither_torch_nor_tensorflow(preset, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    seen = result_of(TOUR, str(preset), env=environment(tmp_path, KERAS_BACKEND="jax"))
    assert seen["foreign"] == []
    assert seen["backend"] == "jax"
    assert 0 < seen["loss"] < 20


@pytest.mark.slow
def test_with_only_jax_installed_and_no_setting_everything_works(preset, tmp_path):
    seen = result_of(HIDE + TOUR, str(preset), env=environment(tmp_path / "fresh"))
    assert seen["backend"] == "jax"
    assert seen["foreign"] == []
    assert 0 < seen["loss"] < 20


def test_the_keras_json_that_keras_wrote_itself_does_not_stop_jax(tmp_path):
    # Keras writes a keras.json with "tensorflow" in it when it is first imported.
    (tmp_path / "keras.json").write_text('{"backend": "tensorflow"}')
    code = HIDE + "import json, puna.models, keras; print(json.dumps(keras.backend.backend()))"
    assert result_of(code, env=environment(tmp_path)) == "jax"


def test_importing_puna_imports_nothing_and_is_quick():
    code = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import puna
seconds = time.perf_counter() - start
heavy = {"keras", "numpy", "jax", "torch", "tensorflow", "tokenizers", "huggingface_hub"}
print(json.dumps({"seconds": seconds, "heavy": sorted(heavy & (set(sys.modules) - before))}))
"""
    seen = result_of(code)
    assert seen["heavy"] == []
    assert seen["seconds"] < 0.1


@pytest.mark.parametrize("name", ["LlamaConfig", "errors"])
def test_names_that_need_no_keras_import_none(name):
    code = f"""
import json, sys, puna
puna.{name}
print(json.dumps("keras" in sys.modules))
"""
    assert result_of(code) is False
