"""JAX: one compiled program per step, donated caches, weights that alias mapped files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from puna.backend.generic import attention
from puna.backend.memory import ALIGNMENT, aligned_copy, is_aligned
from puna.backend.protocol import Tensor

__all__ = [
    "aliases", "attention", "cache_dtype", "cache_write", "compile_step", "embed", "initialize",
    "linear",
    "prepare", "to_numpy",
]  # fmt: skip


def linear(x: Tensor, weight: Tensor, out_dtype: str) -> Tensor:
    """See `BackendOps.linear`; the form of the product matters on a CPU, so it is chosen here."""
    flat = x.reshape(-1, x.shape[-1])
    half = weight.dtype in (jnp.bfloat16, jnp.float16)
    if half and flat.shape[0] == 1 and jax.default_backend() == "cpu":
        # As a dot of one row, XLA makes a float32 copy of all weights first, ten times slower; so
        # it converts what it reads (docs/log.md, "Products on the CPU").
        y = (weight.astype(jnp.float32) * flat[0].astype(jnp.float32)).sum(axis=-1)
    else:
        accumulate = None if out_dtype == "float64" else jnp.float32
        contract_last = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(flat, weight, contract_last, preferred_element_type=accumulate)
    return y.astype(out_dtype).reshape(*x.shape[:-1], weight.shape[0])


def embed(weight: Tensor, token_ids: Tensor) -> Tensor:
    """See `BackendOps.embed`."""
    weight = jnp.asarray(weight)
    if weight.dtype in (jnp.bfloat16, jnp.float16):
        return _take_half(weight, token_ids)
    return jnp.take(weight, token_ids, axis=0)


@jax.custom_jvp
def _take_half(weight: Tensor, token_ids: Tensor) -> Tensor:
    """Rows of a half-precision table, by their bits: XLA on a CPU copies it to float32 else."""
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint16)
    return jax.lax.bitcast_convert_type(jnp.take(bits, token_ids, axis=0), weight.dtype)


@_take_half.defjvp
def _take_half_jvp(primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]):
    (weight, token_ids), (change, _) = primals, tangents
    return _take_half(weight, token_ids), jnp.take(change, token_ids, axis=0)


def cache_dtype(compute_dtype: str) -> str:
    """See `BackendOps.cache_dtype`; XLA on a CPU rewrites a whole bfloat16 cache per token."""
    if compute_dtype == "bfloat16" and jax.default_backend() == "cpu":
        return "float32"
    return compute_dtype


def cache_write(cache_BKSH: Tensor, new_BKTH: Tensor, start_B: Tensor) -> Tensor:
    """See `BackendOps.cache_write`; in place where the cache was donated."""

    def write_row(cache_KSH, new_KTH, start):
        return jax.lax.dynamic_update_slice(cache_KSH, new_KTH, (0, start, 0))

    return jax.vmap(write_row)(cache_BKSH, new_BKTH.astype(cache_BKSH.dtype), start_B)


def aliases(array: np.ndarray) -> bool:
    """See `BackendOps.aliases`."""
    return jax.default_backend() == "cpu" and is_aligned(array)


def prepare(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """See `BackendOps.prepare`."""
    if array.dtype == dtype and (is_aligned(array) or jax.default_backend() != "cpu"):
        return array
    return aligned_copy(array, dtype)


def initialize(variable: Any, array: np.ndarray) -> None:
    """See `BackendOps.initialize`; sharded from the start where a distribution is set."""
    variable._initialize_layout()
    layout = getattr(variable._layout, "backend_layout", variable._layout)
    if layout is not None:
        shape = tuple(array.shape)
        value = jax.make_array_from_callback(shape, layout, lambda index: array[index])
    else:
        value = jax.device_put(array)
    # The copy to a device may still be running, and the caller lets go of the pages next.
    variable._initialize(jax.block_until_ready(value))


def to_numpy(variable: Any) -> np.ndarray:
    """See `BackendOps.to_numpy`."""
    return np.asarray(variable.value)


def compile_step(
    function: Callable[..., Any], variables: Sequence[Any], donate: Sequence[int] = ()
) -> Callable[..., Any]:
    """See `BackendOps.compile_step`; weights are arguments, so that XLA folds none of them."""
    _keep_compiled_programs()

    def stateless(weights: list[Tensor], *args: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True))):
            return function(*args)

    compiled = jax.jit(stateless, donate_argnums=[position + 1 for position in donate])

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
