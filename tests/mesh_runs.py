"""What a model on eight devices computes, beside one device; see `tests/meshes.py`."""

from __future__ import annotations

import re
from typing import Any

from tests.meshes import (
    DEVICES,
    IDS,
    MESHES,
    ODD_HEADS,
    ROWS,
    SHAPE,
    differences,
    done_by,
    model_of,
    on,
)


def parities(
    kind: str, meshes: tuple[tuple[int, int], ...], fsdp: bool = False, **changes: Any
) -> dict[str, Any]:
    """How far models on meshes are from one device."""
    on(None)
    wanted = done_by(model_of(kind, **changes))
    found = {}
    for mesh in meshes:
        on(mesh, fsdp)
        found[str(mesh)] = differences(done_by(model_of(kind, **changes)), wanted)
    on(None)
    return found


def parity() -> dict[str, Any]:
    """A plain model on one mesh that cuts rows and weights."""
    return parities("plain", ((2, 4),))


def parity_elsewhere() -> dict[str, Any]:
    """The same on the other meshes."""
    return parities("plain", ((1, 8), (8, 1), (4, 2)))


def parity_lora() -> dict[str, Any]:
    """With adapters."""
    return parities("lora", MESHES)


def parity_int8() -> dict[str, Any]:
    """With adapters beside int8."""
    return parities("int8 lora", MESHES)


def parity_int4() -> dict[str, Any]:
    """With DoRA beside int4."""
    return parities("int4 lora dora", MESHES)


def parity_fsdp() -> dict[str, Any]:
    """With matrices that are cut along the batch axis too."""
    return parities("lora", ((8, 1), (2, 4)), fsdp=True, num_hidden_layers=1)


def parity_odd_heads() -> dict[str, Any]:
    """SmolLM2's heads, which eight devices do not divide."""
    return parities("plain", ((1, 8), (2, 4)), **ODD_HEADS)


def parity_shared_heads() -> dict[str, Any]:
    """Two key/value heads on eight devices: each on all, of which four read the same one."""
    return parities("plain", ((1, 8),), num_key_value_heads=2)


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


_GATHERED = re.compile(r"= f32\[([\d,]+)\]\S* all-gather\(")


def fsdp_step() -> dict[str, Any]:
    """What the gradients of a step gather where matrices are cut along the batch axis too."""
    import jax
    import keras
    import numpy as np

    from puna.backend import jax_shards

    ids = np.resize(np.array(IDS[0], np.int32), (8, 16))
    found = {}
    for mesh in ((8, 1), (2, 4)):
        for kind in ("plain", "lora"):
            on(mesh, fsdp=True)
            model = model_of(kind, num_hidden_layers=3)
            place: Any = jax_shards.current_mesh()
            own = place.spec(ids.shape, place.batch)

            model.compile(optimizer=keras.optimizers.SGD(0.1))

            def loss(trained: Any, others: Any, rows: Any, model: Any = model) -> Any:
                found, _ = model.compute_loss_and_updates(
                    trained, others, [], {"token_ids": rows}, rows, jax.numpy.ones(rows.shape)
                )
                return found

            trained, others = (
                [v.value for v in variables]
                for variables in (model.trainable_variables, model.non_trainable_variables)
            )
            step = jax.jit(jax.grad(loss))
            text = step.lower(trained, others, jax.device_put(ids, own)).compile().as_text()
            shapes = [[*map(int, shape.split(","))] for shape in _GATHERED.findall(text)]
            found[f"{mesh} {kind}"] = {
                "gathered": sorted(shapes),
                # A matrix as those have it that share out rows: cut along the model axis alone.
                # Of the embedding, which is not the head, rows are sent.
                "planned": sorted(
                    [
                        size // (mesh[1] if axis == "model" else 1)
                        for size, axis in zip(v.shape, v._layout.axes, strict=True)
                    ]
                    for v in model.variables
                    if "batch" in v._layout.axes and "embed_tokens" not in v.path
                ),
            }
    on(None)
    return found
