"""Filling a model that was built without memory, straight from the mapped files."""

from __future__ import annotations

import fnmatch
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from puna import backend
from puna.backend import build
from puna.checkpoint.expected import EMBEDDING, HEAD, check_tied, some
from puna.checkpoint.source import TensorSource
from puna.checkpoint.variable_names import NO_PARAMETERS
from puna.errors import PresetError

# Tensors converted ahead of the one being placed: enough to keep both busy, few enough that their
# memory does not show.
_AHEAD = 2


def load_weights(variables: Mapping[str, Any], source: TensorSource, *, has_head: bool) -> None:
    """Give every variable its tensor's value, each once, and account for every tensor.

    Args:
        variables: uninitialised Keras variables under the checkpoint's names.
        source: the checkpoint's tensors.
        has_head: whether the model computes logits; a backbone alone leaves `lm_head.*` unread.

    Raises:
        PresetError: a tensor is missing, has another shape, or belongs to nothing. The message
            names them; no variable has been touched then.
    """
    stored = _stored_names(variables, source)
    _check(variables, source, stored, has_head)
    for name, prepared, kept in _prepared(variables, source, stored):
        variable = variables[name]
        backend.ops.initialize(variable, prepared)
        build.mark_initialized(variable)
        if not kept:
            source.release(stored[name])


def _stored_names(variables: Mapping[str, Any], source: TensorSource) -> dict[str, str]:
    """Our name of each tensor to the file's: files of a bare backbone lack the `model.`."""
    names = source.names()
    if any(name.startswith("model.") for name in names):
        return {name: name for name in variables}
    return {name: name.removeprefix("model.") for name in variables}


def _check(
    variables: Mapping[str, Any],
    source: TensorSource,
    stored: Mapping[str, str],
    has_head: bool,
) -> None:
    names = set(source.names())
    if missing := [name for name in variables if stored[name] not in names]:
        raise PresetError(f"the checkpoint lacks {some(missing)}; expected {len(variables)} in all")
    wrong = [
        f"{name} {source.info(stored[name]).shape} instead of {tuple(variable.shape)}"
        for name, variable in variables.items()
        if source.info(stored[name]).shape != tuple(variable.shape)
    ]
    if wrong:
        raise PresetError(f"config.json and the checkpoint differ in the shape of {some(wrong)}")
    left = sorted(names - set(stored.values()))
    left = [n for n in left if not any(fnmatch.fnmatch(n, pattern) for pattern in NO_PARAMETERS)]
    if not has_head:
        left = [name for name in left if not name.startswith("lm_head.")]
    elif HEAD in left and HEAD not in variables:
        check_tied(source, stored[EMBEDDING])
        left.remove(HEAD)
    if left:
        raise PresetError(f"the checkpoint holds tensors that a Llama does not: {some(left)}")


def _prepared(
    variables: Mapping[str, Any], source: TensorSource, stored: Mapping[str, str]
) -> Iterator[tuple[str, Any, bool]]:
    """Each tensor as its variable wants it, prepared by threads a little ahead of its use.

    The last item says whether the variable will keep using the file's own pages.
    """

    def prepare(name: str) -> tuple[str, Any, bool]:
        array = source.read(stored[name])
        prepared = backend.ops.prepare(variables[name], array)
        return name, prepared, backend.ops.keeps(prepared, array)

    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="puna-load") as pool:
        pending: deque[Future[tuple[str, Any, bool]]] = deque()
        for name in variables:
            pending.append(pool.submit(prepare, name))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
