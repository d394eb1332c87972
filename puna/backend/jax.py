"""JAX: one compiled program per step, donated caches, weights that alias mapped files."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from puna.backend import generic, jax_shards
from puna.backend.generic import (
    attention,
    cond,
    dequantize,
    embed_packed,
    merge_heads,
    place,
    rms_norm,
    rotate,
    silu,
    split_heads,
    switch,
    value,
    while_loop,
)
from puna.backend.jax_accumulate import accumulated_step
from puna.backend.jax_loss import head_loss
from puna.backend.jax_shards import by_rows, whole_logits
from puna.backend.kernels import jax_calls
from puna.backend.kernels.library import FEW_TOKENS
from puna.backend.memory import ALIGNMENT, aligned_copy, aligned_zeros, is_aligned, numpy_dtype
from puna.backend.packed import Packed
from puna.backend.protocol import BlockWeights, Place, Tensor

__all__ = [
    "accumulated_step", "assign", "attend", "attention", "cache_dtype", "cache_read", "cache_write",
    "call_block", "call_blocks", "compile_step", "cond", "embed", "gated", "gathered", "head_loss",
    "initialize", "initialize_at_random", "keeps", "linear", "linears", "merge_heads", "place",
    "prepare", "rms_norm", "rotate", "silu", "split_heads", "switch", "to_numpy", "value",
    "while_loop", "whole_logits",
]  # fmt: skip


TOKENS_PER_CALL = 8
RUNS_AHEAD = True
BLOCKS_CALL_TOKENS = FEW_TOKENS


def linear(x: Tensor, weight: Tensor | Packed, out_dtype: str) -> Tensor:
    """See `BackendOps.linear`."""
    return linears(x, (weight,), out_dtype)[0]


def linears(x: Tensor, weights: Sequence[Tensor | Packed], out_dtype: str) -> tuple[Tensor, ...]:
    """See `BackendOps.linears`; on a CPU by native kernels."""
    x, weights = _alike(x, weights)
    if jax_calls.usable(x, weights, out_dtype):
        return jax_calls.linears(x, weights, out_dtype)
    return tuple(_linear(x, weight, out_dtype) for weight in weights)


def gated(x: Tensor, gate: Tensor | Packed, up: Tensor | Packed, out_dtype: str) -> Tensor:
    """See `BackendOps.gated`; on a CPU by a native kernel."""
    x, (gate, up) = _alike(x, (gate, up))
    if jax_calls.usable(x, (gate, up), out_dtype):
        return jax_calls.gated(x, gate, up, out_dtype)
    return silu(_linear(x, gate, out_dtype)) * _linear(x, up, out_dtype)


def _alike(x: Tensor, weights: Sequence[Tensor | Packed]) -> tuple[Tensor, list[Tensor | Packed]]:
    """Arrays, with `x` in the dtype of weights that are not packed."""
    weights = [w if isinstance(w, Packed) else jnp.asarray(w) for w in weights]
    if not isinstance(weights[0], Packed):
        x = jnp.asarray(x).astype(weights[0].dtype)
    return x, weights


def _linear(x: Tensor, weight: Tensor | Packed, out_dtype: str) -> Tensor:
    """`linear` as XLA computes it; the form matters on a CPU, so it is chosen here."""
    matrix: Any = dequantize(weight, x.dtype.name) if isinstance(weight, Packed) else weight
    flat = x.reshape(-1, x.shape[-1]).astype(matrix.dtype)
    half = matrix.dtype in (jnp.bfloat16, jnp.float16)
    if half and flat.shape[0] == 1 and jax.default_backend() == "cpu":
        # As a dot of one row, XLA makes a float32 copy of all weights first, ten times slower; so
        # it converts what it reads (docs/log.md, "Products on the CPU"). The barrier ties weight
        # and row, lest XLA converts the weight ahead of a loop over tokens.
        matrix, flat = _tied(matrix, flat)
        y = (matrix.astype(jnp.float32) * flat[0].astype(jnp.float32)).sum(axis=-1)
    else:
        accumulate = None if out_dtype == "float64" else jnp.float32
        contract_last = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(flat, matrix, contract_last, preferred_element_type=accumulate)
    return y.astype(out_dtype).reshape(*x.shape[:-1], matrix.shape[0])


def _tied(*arrays: Tensor) -> Any:
    return jax.lax.optimization_barrier(arrays)


def embed(weight: Tensor | Packed, token_ids: Tensor) -> Tensor:
    """See `BackendOps.embed`; a distribution gets its hidden states by rows."""
    if isinstance(weight, Packed):
        rows = embed_packed(weight, token_ids)
    elif weight.dtype in (jnp.bfloat16, jnp.float16):
        rows = _take_half(jnp.asarray(weight), token_ids)
    else:
        rows = jnp.take(jnp.asarray(weight), token_ids, axis=0)
    return by_rows(rows)


@jax.custom_jvp
def _take_half(weight: Tensor, token_ids: Tensor) -> Tensor:
    """Rows of a half-precision table, by their bits: XLA on a CPU copies it to float32 else."""
    weight, token_ids = _tied(weight, token_ids)  # as in `_linear`
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint16)
    return jax.lax.bitcast_convert_type(jnp.take(bits, token_ids, axis=0), weight.dtype)


@_take_half.defjvp
def _take_half_jvp(primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]):
    (weight, token_ids), (change, _) = primals, tangents
    return _take_half(weight, token_ids), jnp.take(change, token_ids, axis=0)


def attend(
    projected: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place: Place,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """See `BackendOps.attend`; in place where the cache was donated."""
    if not jax_calls.attends(projected, cache):
        return None
    return jax_calls.attend(projected, rotary, cache, place.start_B)


class _Tracing(threading.local):
    """Blocks that the step under way has traced; None where nothing is traced."""

    blocks: dict[Any, Callable[..., Any]] | None = None


_tracing = _Tracing()


def call_block(
    block: Any,
    like: Any,
    x_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Any,
    place: Place,
) -> tuple[Tensor, Any]:
    """See `BackendOps.call_block`: a step of 30 blocks is traced and lowered as one of one."""
    blocks = _tracing.blocks
    if blocks is None:
        return generic.call_block(block, like, x_BTD, rotary, cache, place)
    variables, others = block.variables, like.variables
    form, form_of_like = ([(v.name, v.shape, v.dtype) for v in vs] for vs in (variables, others))
    if form != form_of_like or block.constants() != like.constants():
        return generic.call_block(block, like, x_BTD, rotary, cache, place)
    if like not in blocks:

        def run(weights, x_BTD, rotary, cache, write, mask_B1TS, start_B):
            # What is no array is the same for all blocks of a step.
            own = Place(write, place.live, mask_B1TS, start_B)
            with keras.StatelessScope(state_mapping=list(zip(others, weights, strict=True))):
                return like.call(x_BTD, rotary, mask_B1TS, cache, own)

        blocks[like] = jax.jit(run)
    weights = [variable.value for variable in variables]
    return blocks[like](weights, x_BTD, rotary, cache, place.write, place.mask_B1TS, place.start_B)


def call_blocks(
    blocks: Callable[[], Sequence[BlockWeights] | None],
    epsilon: float,
    x_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Sequence[tuple[Tensor, Tensor]],
    place: Place,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """See `BackendOps.call_blocks`; in place where the cache was donated."""
    if not jax_calls.attends((x_BTD,), cache[0]):
        return None
    weights = blocks()
    if weights is None or not jax_calls.takes_blocks(weights):
        return None
    return jax_calls.call_blocks(weights, epsilon, x_BTD, rotary, cache, place.start_B)


def cache_dtype(compute_dtype: str, wanted: str | None = None) -> str:
    """See `BackendOps.cache_dtype`; XLA on a CPU rewrites a whole bfloat16 cache per token."""
    if (wanted or compute_dtype) == "bfloat16" and jax.default_backend() == "cpu":
        return "float32" if wanted is None else "uint16"
    return wanted or compute_dtype


def cache_read(cache_BKSH: Tensor, dtype: str) -> Tensor:
    """See `BackendOps.cache_read`."""
    if cache_BKSH.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(cache_BKSH.astype(jnp.uint32) << 16, jnp.float32)
    return cache_BKSH if cache_BKSH.dtype == jnp.float32 else cache_BKSH.astype(dtype)


def cache_write(cache_BKSH: Tensor, new_BKTH: Tensor, write: Tensor) -> Tensor:
    """See `BackendOps.cache_write`; in place where the cache was donated."""
    if cache_BKSH.dtype == jnp.uint16 and new_BKTH.dtype != jnp.uint16:
        new_BKTH = jax.lax.bitcast_convert_type(new_BKTH.astype(jnp.bfloat16), jnp.uint16)

    def write_row(cache_KSH, new_KTH, start):
        return jax.lax.dynamic_update_slice(cache_KSH, new_KTH, (0, start, 0))

    written = jax.vmap(write_row)(cache_BKSH, new_BKTH.astype(cache_BKSH.dtype), write)
    return jax_shards.placed(written)


def to_device(array: np.ndarray) -> Tensor:
    """See `BackendOps.to_device`."""
    return jax_shards.put(array)


def zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    """See `BackendOps.zeros`."""
    if jax.default_backend() == "cpu":
        return jax_shards.put(aligned_zeros(shape, numpy_dtype(dtype)))
    return jnp.zeros(shape, dtype, device=jax_shards.place_of(shape))


def gather_rows(
    sources: Sequence[tuple[Tensor, int] | None], shape: tuple[int, int, int, int]
) -> Tensor:
    """See `BackendOps.gather_rows`; on a CPU by NumPy, which has nothing to compile."""
    S = shape[2]
    dtype = next(source[0].dtype for source in sources if source is not None)
    if jax.default_backend() == "cpu":
        gathered = aligned_zeros(shape, dtype)
        for row, source in zip(gathered, sources, strict=True):
            if source is not None:
                old = jax_shards.gather(source[0])[source[1], :, :S]
                row[:, : old.shape[1]] = old
        return jax_shards.put(gathered)
    empty = zeros(shape[1:], dtype.name)
    rows = [empty if s is None else s[0][s[1], :, :S] for s in sources]
    rows = [jnp.pad(r, ((0, 0), (0, S - r.shape[1]), (0, 0))) for r in rows]
    return jax_shards.placed(jnp.stack(rows))


def prepare(variable: Any, array: np.ndarray) -> np.ndarray | jax_shards.Shards:
    """See `BackendOps.prepare`."""
    dtype = numpy_dtype(variable._dtype)

    def suited(array: np.ndarray) -> np.ndarray:
        if array.dtype == dtype and (is_aligned(array) or jax.default_backend() != "cpu"):
            return array
        return aligned_copy(array, dtype)

    sharding = jax_shards.sharding_of(variable)
    return suited(array) if sharding is None else jax_shards.cut(array, sharding, suited)


def initialize(variable: Any, prepared: np.ndarray | jax_shards.Shards) -> None:
    """See `BackendOps.initialize`; each device gets its own shard where a distribution is set."""
    is_cut = isinstance(prepared, jax_shards.Shards)
    value = prepared.assemble() if is_cut else jax.device_put(prepared)
    # The copy to a device may still be running, and the caller lets go of the pages next.
    variable._initialize(jax.block_until_ready(value))


def keeps(prepared: np.ndarray | jax_shards.Shards, array: np.ndarray) -> bool:
    """See `BackendOps.keeps`."""
    is_cut = isinstance(prepared, jax_shards.Shards)
    parts = [part for _, part in prepared.parts] if is_cut else [prepared]
    return jax.default_backend() == "cpu" and any(
        is_aligned(part) and np.may_share_memory(part, array) for part in parts
    )


def initialize_at_random(variable: Any) -> None:
    """See `BackendOps.initialize_at_random`; each device draws its own shard."""
    sharding = jax_shards.sharding_of(variable)
    if sharding is None:
        generic.initialize_at_random(variable)
    else:
        jax_shards.initialize_at_random(variable, sharding)


def assign(variable: Any, array: np.ndarray) -> None:
    """See `BackendOps.assign`; each device gets its own shard."""
    if variable._layout is None:
        variable.assign(array)
        return
    dtype = numpy_dtype(variable._dtype)
    sharding = jax_shards.sharding_of(variable)
    shards = jax_shards.cut(array, sharding, lambda part: aligned_copy(part, dtype))
    variable._direct_assign(shards.assemble())


def to_numpy(variable: Any) -> np.ndarray:
    """See `BackendOps.to_numpy`."""
    return jax_shards.gather(variable.value)


def gathered(tensor: Tensor) -> np.ndarray:
    """See `BackendOps.gathered`."""
    return jax_shards.gather(tensor)


def compile_step(
    function: Callable[..., Any], variables: Sequence[Any], donate: Sequence[int] = ()
) -> Callable[..., Any]:
    """See `BackendOps.compile_step`; weights are arguments, so that XLA folds none of them."""
    _keep_compiled_programs()
    jax_shards.check_places(variables)

    def stateless(weights: list[Tensor], *args: Any) -> Any:
        before, _tracing.blocks = _tracing.blocks, {}
        try:
            with keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True))):
                return jax.tree.map(jax_shards.placed, function(*args))
        finally:
            _tracing.blocks = before

    compiled = jax.jit(stateless, donate_argnums=[position + 1 for position in donate])

    @functools.wraps(compiled)
    def step(*args: Any) -> Any:
        return compiled([variable.value for variable in variables], *args)

    return step


def _keep_compiled_programs() -> None:
    """Keep compiled programs on disk between runs, unless the user has settled it.

    `JAX_COMPILATION_CACHE_DIR` names another place; `JAX_ENABLE_COMPILATION_CACHE=0` keeps none.
    """
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "puna" / "xla"))


assert ALIGNMENT == 64  # what XLA's CPU client asks of memory that it adopts
