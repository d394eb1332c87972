"""What is to be seen of a model on eight devices, for tests: a process of its own makes them.

`seen("parity", ...)` runs the functions of those names below in one process with eight CPU devices,
as starting JAX and compiling for eight devices takes seconds, and returns what they return.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.processes import result_of

DEVICES = 8
MESHES = ((1, 8), (2, 4), (8, 1), (4, 2))

# All that eight devices can divide.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 320,
}
# As SmolLM2's: 9 query heads and 3 key/value heads.
ODD_HEADS: dict[str, Any] = SHAPE | {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
ROWS = ["Hello there world", "Hi you are", "the system", "you", "a user and an assistant"]
IDS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2], [30, 1, 2, 9, 9, 9, 9, 1], [5] * 8]


def seen(*names: str) -> dict[str, Any]:
    """What the functions of these names return, each run after the other in one process."""
    code = "import sys; from tests import meshes; meshes.main(sys.argv[1:])"
    return result_of(code, *names, env=eight_devices())


def eight_devices() -> dict[str, str]:
    """The environment of a process that has eight devices."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    return os.environ | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }


def main(names: list[str]) -> None:
    """Run functions of this module and print what they return as JSON."""
    warnings.simplefilter("ignore")
    print(json.dumps({name: getattr(sys.modules[__name__], name)() for name in names}))


def on(mesh: tuple[int, int] | None, fsdp: bool = False) -> None:
    """Set the distribution that `from_preset(mesh=...)` sets; None sets none."""
    import keras

    from puna.models import Llama3Backbone

    distribution = None
    if mesh is not None:
        devices = keras.distribution.list_devices()
        device_mesh = keras.distribution.DeviceMesh(mesh, ["batch", "model"], devices)
        layout_map = Llama3Backbone.get_layout_map(device_mesh, fsdp=fsdp)
        distribution = keras.distribution.ModelParallel(
            layout_map=layout_map, batch_dim_name="batch"
        )
    keras.distribution.set_distribution(distribution)


def model_of(kind: str, **changes: Any) -> Any:
    """A tiny model; "lora", "int8" and "int4" in its kind say what is done to it."""
    import numpy as np

    from puna.testing import tiny_model

    model = tiny_model(**(SHAPE | changes))
    for mode in ("int8", "int4"):
        if mode in kind:
            model.quantize(mode)
    if "lora" in kind:
        model.enable_lora(4, dora="dora" in kind)
        numbers = np.random.default_rng(1)
        for variable in model.adapter_tensors().values():
            variable.assign(numbers.normal(0, 0.1, variable.shape).astype("float32"))
    return model


def done_by(model: Any, *, trains: bool = True) -> dict[str, Any]:
    """A model's logits, what it generates, and one step's loss and gradients."""
    import keras
    import numpy as np

    from puna.tuning import TextData

    found: dict[str, Any] = {"logits": np.asarray(model.predict(np.array(IDS), verbose=0))}
    found["tokens"] = [
        list(map(int, row)) for row in model.generate(IDS[:3], max_new_tokens=6, sampler="greedy")
    ]
    if not trains:
        return found
    # With this optimizer a step changes each weight by its gradient.
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    before = {v.path: np.array(v.value) for v in model.trainable_variables}
    data = TextData(ROWS, packing=True, sequence_length=32)
    history = model.fit(data, batch_size=4, epochs=1, shuffle=False, verbose=0).history
    found["loss"] = history["loss"]
    found["gradients"] = {
        v.path: before[v.path] - np.array(v.value) for v in model.trainable_variables
    }
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """How far what two models do is apart."""
    import numpy as np

    apart: dict[str, Any] = {
        "logits": float(np.abs(found["logits"] - wanted["logits"]).max()),
        "tokens": found["tokens"] == wanted["tokens"],
    }
    if "loss" in found:
        apart["loss"] = float(np.abs(np.subtract(found["loss"], wanted["loss"])).max())
        pairs = [(found["gradients"][path], value) for path, value in wanted["gradients"].items()]
        apart["gradients"] = max(
            float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in pairs
        )
    return apart


def _parities(kind: str, meshes: tuple[tuple[int, int], ...], **changes: Any) -> dict[str, Any]:
    on(None)
    wanted = done_by(model_of(kind, **changes))
    found = {}
    for mesh in meshes:
        on(mesh)
        found[str(mesh)] = differences(done_by(model_of(kind, **changes)), wanted)
    on(None)
    return found


def parity() -> dict[str, Any]:
    """A plain model on one mesh that cuts rows and weights."""
    return _parities("plain", ((2, 4),))


def parity_elsewhere() -> dict[str, Any]:
    """The same on the other meshes."""
    return _parities("plain", ((1, 8), (8, 1), (4, 2)))


def parity_lora() -> dict[str, Any]:
    """With adapters."""
    return _parities("lora", MESHES)


def parity_int8() -> dict[str, Any]:
    """With adapters beside int8."""
    return _parities("int8 lora", MESHES)


def parity_int4() -> dict[str, Any]:
    """With DoRA beside int4."""
    return _parities("int4 lora dora", MESHES)


def parity_odd_heads() -> dict[str, Any]:
    """SmolLM2's heads, which eight devices do not divide."""
    return _parities("plain", ((1, 8), (2, 4)), **ODD_HEADS)


def parity_shared_heads() -> dict[str, Any]:
    """Two key/value heads on eight devices: each on all, of which four read the same one."""
    return _parities("plain", ((1, 8),), num_key_value_heads=2)


def parity_bfloat16() -> dict[str, Any]:
    """Half precision, whose rows are looked up by their bits."""
    import numpy as np

    from puna.testing import tiny_model

    def logits() -> Any:
        model = tiny_model(**SHAPE, dtype="bfloat16")
        return np.asarray(model.predict(np.array(IDS), verbose=0))

    on(None)
    wanted = logits()
    on((2, 4))
    return {"logits": float(np.abs(logits() - wanted).max()), "size": float(np.abs(wanted).max())}


def places() -> dict[str, Any]:
    """Where the variables of tiny models lie, and how many bytes each device holds."""
    from puna.backend.jax_shards import bytes_on_devices
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(folder, **SHAPE)
        for mesh, mode, rank in (
            *((mesh, mode, 0) for mesh in MESHES for mode in (None, "int8")),
            ((2, 4), "int4", 4),
        ):
            on(None)
            model = Llama3CausalLM.from_preset(preset, mesh=mesh, quantization=mode)
            if rank:
                model.enable_lora(rank)
            values = [variable.value for variable in model.variables]
            found[f"{mesh} {mode}"] = {
                "axes": {v.path: list(v.value.sharding.spec) for v in model.variables},
                "largest": max(bytes_on_devices(values).values()),
                "total": sum(value.nbytes for value in values),
            }
    on(None)
    return found


def places_of_1b() -> dict[str, Any]:
    """The same of a Llama 3.2 1B, which gets no memory."""
    import math

    from puna import distribution
    from puna.backend import build
    from puna.config import LlamaConfig
    from puna.models import Llama3Backbone, Llama3CausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    found = {}
    for mesh in MESHES:
        on(mesh)
        with build.abstract():
            model = Llama3CausalLM(Llama3Backbone(config=config, dtype="bfloat16"))
        distribution.settle(model)
        weights = model.tensors().values()
        shards = [v._layout.backend_layout.shard_shape(tuple(v.shape)) for v in weights]
        found[str(mesh)] = {
            "largest": sum(map(math.prod, shards)),
            "total": sum(math.prod(v.shape) for v in weights),
            "axes": {v.path: list(v._layout.axes) for v in weights},
        }
    on(None)
    return found


def loading() -> dict[str, Any]:
    """What is copied out of a checkpoint's files, and onto devices, while it is loaded."""
    import jax
    import numpy as np

    from puna.backend import jax_shards
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset
    from tests.unit.test_gguf_models import write as write_gguf

    read: list[int] = []
    put: list[int] = []
    cut, device_put = jax_shards.cut, jax.device_put

    def counting_cut(array: Any, sharding: Any, prepare: Any) -> Any:
        def counted(part: Any) -> Any:
            read.append(part.nbytes)
            return prepare(part)

        return cut(array, sharding, counted)

    def counting_put(value: Any, *arguments: Any, **options: Any) -> Any:
        put.append(value.nbytes)
        return device_put(value, *arguments, **options)

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(Path(folder) / "plain", **SHAPE, dtype="bfloat16")
        ref = Llama3CausalLM.from_preset(preset, dtype="float32", quantization="int4")
        ref.save_to_preset(Path(folder) / "packed")
        gguf = write_gguf(Path(folder) / "model.gguf", "Q4_K")
        cases: list[tuple[str, Any, tuple[int, int], dict[str, Any]]] = [
            ("plain", preset, (1, 8), {}),
            ("two copies", preset, (2, 4), {}),
            ("other dtype", preset, (1, 8), {"dtype": "float32"}),
            ("int8 on load", preset, (1, 8), {"quantization": "int8"}),
            ("packed", Path(folder) / "packed", (1, 8), {}),
            ("gguf", gguf, (4, 2), {"preprocessor": None}),
        ]
        for name, path, mesh, options in cases:
            on(None)
            wanted = Llama3CausalLM.from_preset(path, **options)
            read.clear()
            put.clear()
            jax_shards.cut, jax.device_put = counting_cut, counting_put
            model = Llama3CausalLM.from_preset(path, mesh=mesh, **options)
            jax_shards.cut, jax.device_put = cut, device_put
            values = [variable.value for variable in model.tensors().values()]
            held = jax_shards.bytes_on_devices(values)
            shards = [s.data.nbytes for value in values for s in value.addressable_shards]
            apart = [
                np.array_equal(jax_shards.gather(a.value), np.asarray(b.value))
                for a, b in zip(model.variables, wanted.variables, strict=True)
            ]
            found[name] = {
                "read": sum(read),
                "tensors": sum(value.nbytes for value in values),
                "put": sum(put),
                "held": sum(held.values()),
                "largest put": max(put),
                "largest shard": max(shards),
                "same": all(apart),
            }
    on(None)
    return found


def saving() -> dict[str, Any]:
    """Whether what a model on a mesh saves is what it saves on one device."""
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(Path(folder) / "plain", **SHAPE, dtype="bfloat16")
        for kind in ("plain", "int4"):
            options: dict[str, Any] = {} if kind == "plain" else {"quantization": kind}
            for mesh in (None, (2, 4)):
                on(mesh)
                model = Llama3CausalLM.from_preset(preset, **options)
                model.save_to_preset(Path(folder) / f"{kind} {mesh}")
                kept = [v.value._npy_value is None for v in model.variables] if mesh else []
                found[f"{kind} kept nothing"] = all(kept)
            one, other = (Path(folder) / f"{kind} {mesh}" for mesh in (None, (2, 4)))
            found[kind] = (one / "model.safetensors").read_bytes() == (
                other / "model.safetensors"
            ).read_bytes()
    on(None)
    return found


def random() -> dict[str, Any]:
    """Whether weights drawn on a mesh are those that one device draws, and each device its own."""
    import keras
    import numpy as np

    from puna.models import Llama3Backbone
    from puna.testing import tiny_config

    def drawn(mesh: Any) -> list[Any]:
        on(mesh)
        keras.utils.set_random_seed(5)
        backbone = Llama3Backbone(config=tiny_config(**SHAPE), dtype="float32")
        backbone.enable_lora(4)
        return backbone.variables

    pairs = zip(drawn(None), drawn((1, 8)), strict=True)
    apart = [float(np.abs(np.asarray(a.value) - np.asarray(b.value)).max()) for a, b in pairs]
    on(None)
    return {"apart": max(apart)}


def uneven() -> dict[str, Any]:
    """Training, evaluation and prediction with batches that eight devices do not divide."""
    import keras
    import numpy as np

    def losses(mesh: Any) -> tuple[dict[str, Any], Any]:
        on(mesh)
        model = model_of("lora")
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        history = model.fit(
            ROWS, validation_data=ROWS[:3], batch_size=3, epochs=2, shuffle=False, verbose=0
        )
        told = {name: list(map(float, values)) for name, values in history.history.items()}
        told["evaluate"] = list(map(float, model.evaluate(ROWS[:3], batch_size=2, verbose=0)))
        return told, np.asarray(model.predict(ROWS, batch_size=3, verbose=0))

    wanted, logits = losses(None)
    found, others = losses((8, 1))
    on(None)
    return {
        "wanted": wanted,
        "found": found,
        "rows": len(others),
        "apart": float(np.abs(others - logits).max()),
    }


def moved() -> dict[str, Any]:
    """What is said of a model that is used on other devices than it was made for."""
    from puna.errors import ConfigError

    found = {}
    for name, before, after in (("to many", None, (2, 4)), ("to one", (2, 4), None)):
        on(before)
        model = model_of("plain")
        on(after)
        try:
            model.generate([IDS[0]], max_new_tokens=1)
        except ConfigError as error:
            found[name] = str(error)
    on(None)
    return found


def talking() -> dict[str, Any]:
    """Streams, chats, prompts kept and forgotten, on one device and on a mesh."""
    import puna

    def said(mesh: Any) -> list[Any]:
        on(mesh)
        model = model_of("plain")
        chat = puna.ChatState(model, system="you are", max_new_tokens=4, sampler="greedy")
        answers = [chat.send_message("Hello"), chat.send_message("Hi")]
        streamed = "".join(model.stream("Hello there", max_new_tokens=6, sampler="greedy"))
        cache = model.prompt_cache("Hello there world ")
        options = {"max_new_tokens": 4, "sampler": "greedy"}
        kept = model.generate("Hello there world you", prompt_cache=cache, **options)
        int8 = model.generate(["Hello", "Hi there you"], cache_dtype="int8", **options)
        beam = model.generate("Hello", max_new_tokens=4, sampler="beam")
        likely = [t.logprob for t in model.token_logprobs("Hello there")]
        rounded = [round(number, 3) for number in likely]
        return [answers, streamed, kept, int8, beam, rounded]

    found = said((2, 4)), said(None)
    return {"mesh": found[0], "one": found[1]}


_COLLECTIVE = re.compile(
    r"= \(?(\S+?)[{,].* (all-reduce|all-gather|all-to-all|collective-permute)\("
)


def decode_step() -> dict[str, Any]:
    """The collective operations of the compiled step that makes tokens, on eight devices."""
    from puna.decoding.programs import Programs

    texts = {}
    make = Programs.make
    found = {}
    for kind in ("plain", "int8", "int4", "lora"):
        on((1, DEVICES))
        model = model_of(kind, num_hidden_layers=3)

        def compiled(self: Any, rows: Any, cache: Any, wanted: Any, kind: str = kind) -> Any:
            if kind not in texts:
                step: Any = self._program("make", self._make)
                weights = [variable.value for variable in self._variables]
                lowered = step.__wrapped__.lower(weights, rows, cache, wanted)
                texts[kind] = lowered.compile().as_text()
                found[f"{kind} cache"] = list(cache[0].key_BKSH.sharding.spec)
            return make(self, rows, cache, wanted)

        Programs.make = compiled
        model.generate([IDS[0]], max_new_tokens=1, sampler="greedy")
        Programs.make = make
        lines = texts[kind].splitlines()
        matches = [(match, line) for line in lines if (match := _COLLECTIVE.search(line))]
        found[kind] = [(match[2], match[1], "jit(run)" in line) for match, line in matches]
    on(None)
    return found


def maps() -> dict[str, Any]:
    """What layout maps of one's own do, and what is said of those that do nothing."""
    import keras

    from puna.errors import ConfigError
    from puna.models import Llama3CausalLM
    from puna.testing import write_tiny_preset

    folder = tempfile.TemporaryDirectory()
    devices = keras.distribution.list_devices()
    device_mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)

    both: tuple[dict[str, Any], ...] = ({}, ODD_HEADS)
    for changes in both:
        write_tiny_preset(Path(folder.name) / str(len(changes)), **(SHAPE | changes))

    def tried(rules: dict[str, Any], **changes: Any) -> dict[str, Any]:
        layout_map = keras.distribution.LayoutMap(device_mesh)
        for pattern, axes in rules.items():
            layout_map[pattern] = axes
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
        )
        path = Path(folder.name) / str(len(changes))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model = Llama3CausalLM.from_preset(path)
            except ConfigError as error:
                return {"error": str(error)}
            finally:
                on(None)
        axes = {v.path: list(v.value.sharding.spec) for v in model.variables}
        return {"axes": axes, "warnings": [str(warning.message) for warning in caught]}

    attention = {"self_attn.*(q_proj|k_proj|v_proj).weight": ("model", None)}
    rest = {
        "embed_tokens/weight": ("model", None),
        ".*o_proj/weight": (None, "model"),
        ".*(gate|up)_proj/weight": ("model", None),
        ".*down_proj/weight": (None, "model"),
        ".*lm_head/weight": ("model", None),
    }
    found = {
        "own": tried(attention | rest),
        "partial": tried(attention | {".*nothing/weight": ("model", None)}),
        "keras-hub": tried({"token_embedding/embeddings": ("model", None)}),
        "rank 3": tried({"self_attention.*(query|key|value).kernel": ("model", None, None)}),
        "narrower": tried(attention | rest | {".*q_proj/weight": (None, "model")}),
        "twice": tried({".*q_proj/weight": ("model", None), ".*_proj/weight": ("model", None)}),
        "wrong rank": tried({".*q_proj/weight": ("model",)}),
        "odd heads": tried(rest | attention, **ODD_HEADS),
    }
    folder.cleanup()
    return found


def arguments() -> dict[str, Any]:
    """`from_preset(mesh=...)`, and what it refuses."""
    import keras

    from puna.distribution import automatic_mesh
    from puna.errors import PunaError
    from puna.models import CausalLM, Llama3Backbone
    from puna.testing import tiny_config, write_tiny_preset

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        preset = write_tiny_preset(folder, **SHAPE)

        def mesh_of(name: str, path: Any = preset, **options: Any) -> None:
            try:
                CausalLM.from_preset(path, preprocessor=None, **options)
            except PunaError as error:
                found[name] = str(error)
            else:
                distribution: Any = keras.distribution.distribution()
                found[name] = list(distribution.device_mesh.shape)

        mesh_of("2, 4", mesh=(2, 4))
        mesh_of("again", mesh=(2, 4))
        mesh_of("another", mesh=(4, 2))
        on(None)
        mesh_of("auto", sharding="auto")
        on(None)
        mesh_of("missing", Path(folder) / "none", mesh=(2, 4))
        found["after"] = keras.distribution.distribution() is None
        mesh_of("too many", mesh=(4, 4))
        mesh_of("both", mesh=(2, 4), sharding="auto")
        mesh_of("one number", mesh=8)
        backbone = Llama3Backbone.from_preset(preset, mesh=(1, 2))
        found["backbone"] = list(backbone.embed_tokens.weight.value.sharding.spec)
    on(None)
    big = tiny_config(**SHAPE)
    found["fits"] = automatic_mesh(8, 16 << 30, big, 2 << 30)
    found["fits on four"] = automatic_mesh(8, 16 << 30, big, 30 << 30)
    found["fits on none"] = automatic_mesh(8, 1 << 30, big, 30 << 30)
    return found
