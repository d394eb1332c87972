"""All blocks in one native call, against NumPy in float64 and against block after block."""

import ctypes

import numpy as np
import pytest
from keras import ops

from puna import backend
from puna.backend.kernels import library as kernels
from puna.config import LlamaConfig
from puna.layers.cache import empty_cache
from puna.models import Llama3Backbone
from tests.native import FLOATS, LIBRARY, weight

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels are not built, or off")

COUNT, D, N, K, H, F, S = 2, 96, 4, 2, 16, 160, 40  # blocks, width, heads, their size, hidden, room
SHAPES = {
    "query": (N * H, D), "key": (K * H, D), "value": (K * H, D), "out": (D, N * H),
    "gate": (F, D), "up": (F, D), "down": (D, F),
}  # fmt: skip
BOUNDS = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 6e-3}


class Model:
    """Random blocks, their caches, and the call."""

    def __init__(self, kind, dtype, rows, tokens):
        self.rng, self.dtype, self.rows, self.tokens = np.random.default_rng(0), dtype, rows, tokens
        self.arrays, self.values, self.norms = [], [], []
        for _ in range(COUNT):
            self.norms.append(self.random(2, D) + 1)
            made = {}
            for name, shape in SHAPES.items():
                arrays, values = weight(self.rng, kind, *shape, 32 if "int" in kind else 0)
                if "int" in kind:
                    factor = 0.1 / np.abs(values).max()
                    arrays = (arrays[0], (arrays[1] * factor).astype(arrays[1].dtype))
                    values = values * factor
                made[name] = arrays, values
            self.arrays.append({name: arrays for name, (arrays, _) in made.items()})
            self.values.append({name: values for name, (_, values) in made.items()})
        self.x = self.random(rows, tokens, D)
        self.cos, self.sin = (self.random(rows, tokens, H).astype(np.float32) for _ in range(2))
        self.starts = self.rng.integers(0, S - tokens + 1, rows).astype(np.int32)
        shape = (rows, K, S, H)
        self.cache = [[self.random(*shape).astype(np.float32) for _ in "kv"] for _ in range(COUNT)]

    def random(self, *shape):
        return self.rng.standard_normal(shape).astype(FLOATS[self.dtype])

    def call(self, threads=2, **changes):
        """What comes out, and the caches; what the library objects to is raised."""

        def matrix(arrays, name):
            width = SHAPES[name][1]
            return kernels.matrix_of(arrays, width, 32 if len(arrays) > 1 else width)

        blocks = (kernels.Block * COUNT)(
            *(
                kernels.Block(
                    norms[0].ctypes.data,
                    norms[1].ctypes.data,
                    *(matrix(arrays[name], name) for name in SHAPES),
                )
                for norms, arrays in zip(self.norms, self.arrays, strict=True)
            )
        )
        x, cache = self.x.copy(), [[a.copy() for a in layer] for layer in self.cache]
        pointers = ctypes.c_void_p * COUNT
        keys, values = (pointers(*(layer[i].ctypes.data for layer in cache)) for i in (0, 1))
        call = kernels.Blocks(
            blocks, ctypes.addressof(keys), ctypes.addressof(values),
            *(a.ctypes.data for a in (x, self.cos, self.sin, self.starts)),
            COUNT, self.rows, self.tokens, D, N, K, H, S, H**-0.5, 1e-5,
            kernels.KINDS[self.dtype], kernels.KINDS[self.dtype], 0,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(call, name, value)
        assert LIBRARY is not None
        crew = ctypes.byref(kernels.Threads(None, None, threads))
        why = LIBRARY.puna_blocks(crew, ctypes.byref(call))
        if why is not None:
            raise ValueError(why.decode())
        return x, cache

    def reference(self):
        """The same in float64."""
        x = self.x.astype(np.float64)
        cache = [[a.astype(np.float64) for a in layer] for layer in self.cache]
        for norms, weights, (keys, values) in zip(self.norms, self.values, cache, strict=True):
            w = {name: values.T for name, values in weights.items()}
            y = normed(x, norms[0])
            query = self.turned(self.heads(y @ w["query"]))
            key, value = self.turned(self.heads(y @ w["key"])), self.heads(y @ w["value"])
            attended = np.zeros((self.rows, self.tokens, N, H))
            for row, start in enumerate(self.starts):
                keys[row, :, start : start + self.tokens] = key[row].transpose(1, 0, 2)
                values[row, :, start : start + self.tokens] = value[row].transpose(1, 0, 2)
                for t in range(self.tokens):
                    for head in range(N):
                        live = slice(0, start + t + 1)
                        own = head // (N // K)
                        scores = keys[row, own, live] @ query[row, t, head] * H**-0.5
                        weights = np.exp(scores - scores.max())
                        weights /= weights.sum()
                        attended[row, t, head] = weights @ values[row, own, live]
            x = x + attended.reshape(self.rows, self.tokens, -1) @ w["out"]
            y = normed(x, norms[1])
            gate = y @ w["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
        return x, cache

    def heads(self, x):
        return x.reshape(self.rows, self.tokens, -1, H)

    def turned(self, x):
        exchanged = np.concatenate([x[..., H // 2 :], x[..., : H // 2]], axis=-1)
        return x * self.cos[:, :, None] + exchanged * self.sin[:, :, None]


def normed(x, weight):
    scale = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x / scale * weight.astype(np.float64)


@pytest.mark.backend_free
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_blocks_equal_float64(kind, dtype, each_instruction_set):
    for rows, tokens in ((1, 1), (1, 3), (4, 2), (8, 1)):
        model = Model(kind, dtype, rows, tokens)
        if "int" not in kind:  # of the size that a model's are of
            for arrays, values in zip(model.arrays, model.values, strict=True):
                for name, (array,) in arrays.items():
                    array[...] = (array.astype(np.float32) * 0.1).astype(array.dtype)
                    values[name] = array.astype(np.float64)
        (found, cache), (expected, expected_cache) = model.call(), model.reference()
        bound = BOUNDS[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=bound)
        for layer, expected_layer in zip(cache, expected_cache, strict=True):
            for array, values in zip(layer, expected_layer, strict=True):
                bound = BOUNDS[dtype] * np.abs(values).max()
                np.testing.assert_allclose(array, values, rtol=0, atol=bound)


@pytest.mark.backend_free
def test_threads_do_not_change_the_result(each_instruction_set):
    model = Model("bfloat16", "bfloat16", 2, 2)
    alone, _ = model.call(threads=1)
    for threads in (2, 3, 8):
        for _ in range(20):
            np.testing.assert_array_equal(model.call(threads=threads)[0], alone)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 9}, "too many tokens"),
        ({"kind": 3}, "are floats"),
        ({"key_heads": 3}, "no such number"),
        ({"capacity": 0}, "more than the cache holds"),
        ({"width": 64}, "do not fit together"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Model("float32", "float32", 1, 1).call(**changes)


CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.skipif(backend.ops.BLOCKS_CALL_TOKENS == 0, reason="there is no such call")
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_what_its_blocks_make(dtype, scheme, monkeypatch):
    backbone = Llama3Backbone(config=CONFIG, dtype=dtype)
    if scheme:
        backbone.quantize(scheme)
    calls = []
    call_blocks = backend.ops.call_blocks

    def counted(*args):
        result = call_blocks(*args)
        calls.append(result is not None)
        return result

    def two_steps():
        step = backend.ops.compile_step(backbone.step, backbone.variables, [2])
        cache = empty_cache(CONFIG, 2, 32, dtype)
        tokens, starts = np.array([[3, 1], [4, 9]], np.int32), np.array([0, 0], np.int32)
        put = backend.ops.to_device
        _, cache = step(put(tokens), put(starts), cache)
        x, cache = step(put(tokens[:, :1]), put(starts + 2), cache)
        return ops.convert_to_numpy(ops.cast(x, "float32"))

    monkeypatch.setattr(backend.ops, "call_blocks", counted)
    together = two_steps()
    assert calls == [True, True]
    monkeypatch.setattr(backend.ops, "call_blocks", lambda *args: None)
    tolerance = 3e-2 if dtype == "bfloat16" else 3e-5
    np.testing.assert_allclose(together, two_steps(), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(backend.ops.BLOCKS_CALL_TOKENS == 0, reason="there is no such call")
def test_changed_weights_are_seen():
    backbone = Llama3Backbone(config=CONFIG, dtype="float32")
    step = backend.ops.compile_step(backbone.step, backbone.variables, [2])

    def one():
        tokens, starts = (backend.ops.to_device(np.array(a, np.int32)) for a in ([[3]], [0]))
        x, _ = step(tokens, starts, empty_cache(CONFIG, 1, 32, "float32"))
        return ops.convert_to_numpy(x)

    before = one()
    layer = backbone.transformer_layers[1].mlp.down_proj
    layer.weight.assign(np.zeros(layer.matrix_shape, np.float32))
    after = one()
    assert np.abs(after - before).max() > 1e-3
    layer.quantize("int8")
    step = backend.ops.compile_step(backbone.step, backbone.variables, [2])
    np.testing.assert_allclose(one(), after, atol=1e-5)
