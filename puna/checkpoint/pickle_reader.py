"""The pickles in torch's `.pth` and `.bin` files, read without Python's unpickler.

A pickle is a program that can call anything, so none is run: the few instructions that describe a
dict of tensors are interpreted here, and all others are refused.

Sources: `torch.serialization` and `torch._utils` (what torch writes), CPython's `pickletools`.
"""

from __future__ import annotations

import pickletools
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from puna.errors import PresetError

# torch's name of a dtype, of its storage, and ours.
_DTYPES: dict[str, tuple[str, np.dtype]] = {
    "float64": ("DoubleStorage", np.dtype(np.float64)),
    "float32": ("FloatStorage", np.dtype(np.float32)),
    "float16": ("HalfStorage", np.dtype(np.float16)),
    "bfloat16": ("BFloat16Storage", np.dtype(ml_dtypes.bfloat16)),
    "int64": ("LongStorage", np.dtype(np.int64)),
    "int32": ("IntStorage", np.dtype(np.int32)),
    "int16": ("ShortStorage", np.dtype(np.int16)),
    "int8": ("CharStorage", np.dtype(np.int8)),
    "uint8": ("ByteStorage", np.dtype(np.uint8)),
    "bool": ("BoolStorage", np.dtype(np.bool_)),
    "float8_e4m3fn": ("", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("", np.dtype(ml_dtypes.float8_e5m2)),
}
_STORAGES = {storage: dtype for storage, dtype in _DTYPES.values() if storage}
_UNTYPED = ("torch.storage UntypedStorage", "torch UntypedStorage")

MAX_NDIM = 64  # NumPy's limit
_MARK = object()


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle refers to, such as "torch FloatStorage". It is never imported."""

    name: str


class PickledStorage(NamedTuple):
    """The bytes that tensors are views of. `dtype` is None where the tensor says it."""

    key: str
    dtype: np.dtype | None
    numel: int


class PickledTensor(NamedTuple):
    """A view of a storage: its elements' dtype, and where they are, in elements."""

    storage: PickledStorage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(pickled: bytes, path: Path) -> dict[str, PickledTensor]:
    """The dict of tensors that a pickle describes.

    Args:
        pickled: the pickle.
        path: the file that it is from, for messages.

    Returns:
        Tensors by their names; whether their storages can hold them is for the caller to check.

    Raises:
        PresetError: the pickle is malformed, holds anything but a dict of tensors, or names what
            such a dict does not need.
    """
    try:
        value = _interpret(pickled, path)
    # Whatever is malformed ends in one of these, from the parser or from a stack that is empty.
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        if isinstance(error, PresetError):
            raise
        raise _damaged(path, f"its pickle is malformed ({error!s:.200})") from error
    if not isinstance(value, dict) or not value:
        raise PresetError(
            f"{path} holds a {_kind(value)}, expected a dict of tensors; save model.state_dict()"
        )
    tensors: dict[str, PickledTensor] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, PickledTensor):
            raise PresetError(
                f"{path}: the value of {name!r:.80} is a {_kind(tensor)}, expected a tensor under "
                "a name; save model.state_dict() and nothing beside it"
            )
        tensors[name] = tensor
    return tensors


def _interpret(pickled: bytes, path: Path) -> Any:
    """The object that a pickle describes, of plain values, `_Global`s and `PickledTensor`s."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(pickled):
        word = opcode.name
        if word in _CONSTANTS:
            stack.append(_CONSTANTS[word]())
        elif word in _LITERALS:
            stack.append(argument)
        elif word in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif word in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif word == "MARK":
            stack.append(_MARK)
        elif word == "TUPLE":
            stack.append(tuple(to_mark()))
        elif word in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(word[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif word in ("GLOBAL", "STACK_GLOBAL"):
            if word == "STACK_GLOBAL":
                argument = f"{stack.pop(-2)} {stack.pop()}"
            stack.append(_admitted(argument, path))
        elif word == "BINPERSID":
            stack.append(_storage(stack.pop(), path))
        elif word == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments, path))
        elif word == "BUILD":
            stack.pop()  # a state dict's `_metadata`, the versions of torch's modules
        elif word in ("SETITEM", "SETITEMS"):
            items = to_mark() if word == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set_items(stack[-1], items)
        elif word == "STOP":
            return stack.pop()
        elif word not in ("PROTO", "FRAME"):
            raise PresetError(
                f"{path}: its pickle has the instruction {word}, which no dict of tensors needs; "
                "save model.state_dict() and nothing beside it, or get the model as safetensors"
            )
    raise ValueError("it does not end")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    }
)  # fmt: skip
_ADMITTED = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch Size",
        *_UNTYPED,
        *(f"torch {name}" for name in (*_STORAGES, *_DTYPES)),
    }
)


def _admitted(name: Any, path: Path) -> _Global:
    if name not in _ADMITTED:
        dotted = str(name).replace(" ", ".")
        raise PresetError(
            f"{path}: its pickle names {dotted!r:.200}, which no dict of tensors needs; it may be "
            "made to harm: do not use this file, get the model as safetensors"
        )
    return _Global(name)


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError(f"items are put into a {_kind(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)):  # a nested tuple could take forever to hash
            raise ValueError(f"a {_kind(key)} is a key")
        if key in target:
            raise ValueError(f"the key {key!r:.80} is there twice")
        target[key] = value


def _storage(identity: Any, path: Path) -> PickledStorage:
    """What `("storage", type, key, device, numel)` stands for."""
    match identity:
        case ("storage", _Global(kind), str(key), str(), int(numel)) if numel >= 0:
            if kind in _UNTYPED:
                return PickledStorage(key, None, numel)
            dtype = _STORAGES.get(kind.removeprefix("torch "))
            if dtype is not None:
                return PickledStorage(key, dtype, numel)
    raise _damaged(path, f"its pickle has a storage {reprlib.repr(identity)}")


def _call(function: Any, arguments: Any, path: Path) -> Any:
    """What a call of one of the admitted names would give."""
    name = function.name if isinstance(function, _Global) else ""
    match name, arguments:
        case ("collections OrderedDict", ()):
            return {}
        case ("torch Size", (tuple(shape),)):
            return shape
        case ("torch._utils _rebuild_parameter", (PickledTensor() as tensor, _, _)):
            return tensor
        case ("torch._utils _rebuild_tensor_v2", (PickledStorage() as storage, *view, _, _)):
            return _view(storage, storage.dtype, view)
        case (
            "torch._utils _rebuild_tensor_v3",
            (PickledStorage() as storage, *view, _, _, _Global(word)),
        ):
            return _view(storage, _DTYPES.get(word.removeprefix("torch "), ("", None))[1], view)
    raise _damaged(
        path, f"its pickle calls {name or _kind(function)!r} with {reprlib.repr(arguments)}"
    )


def _view(storage: PickledStorage, dtype: np.dtype | None, view: list[Any]) -> PickledTensor:
    match view:
        case [int(offset), tuple(shape), tuple(strides)]:
            fits = len(shape) == len(strides) <= MAX_NDIM
            if fits and dtype is not None and _are_sizes((offset, *shape, *strides)):
                return PickledTensor(storage, dtype, offset, shape, strides)
    raise ValueError(f"a tensor of dtype {dtype} is described by {reprlib.repr(view)}")


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, PickledTensor) else type(value).__name__.strip("_")


def _damaged(path: Path, what: str) -> PresetError:
    return PresetError(f"{path}: {what}; the file is damaged: fetch it again")
