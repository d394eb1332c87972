"""Several processes that work on one model, each with devices of its own, as on several hosts.

All of them run the same program. What they have to agree upon, such as whether a file could be
written, they tell each other through the service that JAX keeps in process 0, and not through the
devices: there they may wait for each other as long as it takes, and one that dies is missed.

The client of that service is a private name of JAX, as `multihost_utils` has no such thing.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import keras
import numpy as np
from keras.src.utils import rng_utils

from puna.errors import BackendError, ConfigError, HostError

T = TypeVar("T")

_ADDRESS, _COUNT, _INDEX = (
    f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
)
# In milliseconds. Whoever dies is missed by its heartbeats.
_WAIT, _TELLING, _LEAVING = 7 * 24 * 3600 * 1000, 30_000, 5_000
_FAULT = "! "  # what a note about an error begins with
_meetings = itertools.count()


class _State:
    """What this process knows of itself."""

    depth = 0  # of `together`
    told: Exception | None = None  # the others know of it, and end by it too
    has_failed = False  # alone, so that it must not wait for the others at its end


_state = _State()


def _distributed() -> Any:
    from jax._src import distributed

    return distributed.global_state


def start(
    addresses: str | None, processes: int | None, process: int | None, heartbeat: int
) -> None:
    """See `puna.distribution.initialize`."""
    import jax

    addresses = addresses or os.environ.get(_ADDRESS)
    processes = processes if processes is not None else _number(_COUNT)
    process = process if process is not None else _number(_INDEX)
    if jax.distributed.is_initialized():
        raise BackendError(
            "the processes are connected already; call puna.distribution.initialize() once"
        )
    try:
        jax.distributed.initialize(
            addresses.split(",")[0] if addresses else None,
            processes,
            process,
            heartbeat_timeout_seconds=heartbeat,
            # Where all is said, there is nothing to be found out, nor a package of Kubernetes
            # needed. Else SLURM says which GPU is this process's.
            cluster_detection_method=None
            if None in (addresses, processes, process)
            else "deactivate",
        )
        jax.devices()  # finding them takes all processes; from here on one may compute by itself
    except ValueError as error:  # nothing tells where the others are
        raise ConfigError(
            f"this process does not know the others ({error}); start it with python -m puna.launch "
            "or srun, on a TPU pod or in a JobSet, or give job_addresses, num_processes and "
            f"process_id, or {_ADDRESS}, {_COUNT} and {_INDEX}"
        ) from error
    except RuntimeError as error:
        raise BackendError(
            f"the processes could not be connected: {error}; call puna.distribution.initialize() "
            "before anything is computed, and see that process 0 can be reached"
        ) from error
    if index():  # the first process says what all would
        warnings.simplefilter("ignore", UserWarning)
    _leave_if_failed()
    given = rng_utils.get_random_seed()
    _seed(random.randint(1, 10**9) if given is None else given)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ConfigError(f"{name} is {text!r:.80}; expected a whole number")
    return None if text is None else int(text)


def _leave_if_failed() -> None:
    """See that an error that nobody catches ends the other processes too.

    At its end a process waits for the others, which may be waiting for it, on a device.
    """
    before = sys.excepthook

    def hook(*error: Any) -> None:
        before(*error)
        _state.has_failed = _state.told is not error[1]

    sys.excepthook = hook
    atexit.register(_leave)  # before what JAX has registered


def _leave() -> None:
    if not _state.has_failed:
        return
    try:  # where all end by the same error, none has to end the others
        _distributed().client.wait_at_barrier("puna-leave", _LEAVING)
    except Exception:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# Who shares the work


def count() -> int:
    """How many processes share the work; 1 where no distribution is set."""
    if keras.distribution.distribution() is None:
        return 1
    return processes()


def processes() -> int:
    """How many processes `start` has connected."""
    return _distributed().num_processes if keras.backend.backend() == "jax" else 1


def index() -> int:
    """Which of them this process is."""
    return _distributed().process_id if processes() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and speaks for all that share the work."""
    return count() == 1 or index() == 0


# What they tell each other


def _meet(note: str = "") -> list[str]:
    """Wait for all processes, and hear what they have to say; most say nothing.

    Raises:
        HostError: one of them has failed, or has ended.
    """
    said, why = _heard(note, _WAIT)
    faults = [text.removeprefix(_FAULT) for text in said if text.startswith(_FAULT)]
    if not why and not faults:
        return said
    error = HostError("; ".join(faults) or f"another process has ended: {why}")
    _state.told = None if why else error
    raise error


def _heard(note: str, wait: int) -> tuple[list[str], str]:
    """What is said at a meeting, and why not all came to it, if not all did."""
    service, number = _distributed(), next(_meetings)
    if note:
        service.client.key_value_set(f"puna/{number}/{service.process_id:06d}", note)
    why = ""
    try:
        service.client.wait_at_barrier("puna", wait)
        if service.process_id == 0:
            # All have come to this meeting, so all have heard what was said at the one before.
            service.client.key_value_delete(f"puna/{number - 1}/")
    except Exception as error:  # JAX has no class for it
        why = str(error).splitlines()[0]
    return [text for _, text in sorted(service.client.key_value_dir_get(f"puna/{number}/"))], why


def from_first(value: T) -> T:
    """What process 0 has of a value that JSON can say, whether a distribution is set or not."""
    if processes() == 1:
        return value
    return json.loads(_meet(json.dumps(value) if index() == 0 else "")[0])


def told(value: T) -> T:
    """The same, of the processes that share the work; so all go by one value."""
    return value if count() == 1 else from_first(value)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    return bool(flag) if count() == 1 else bool(_meet("1" if flag else ""))


def check_same(what: str, value: Any) -> None:
    """Refuse what is not the same in all processes.

    Args:
        what: it is, for the error.
        value: what JSON can say.

    Raises:
        HostError: it is another one in some process than in process 0.
    """
    if count() == 1:
        return
    mine, first = (json.dumps(v, sort_keys=True) for v in (value, from_first(value)))
    if any_of(mine != first):
        raise HostError(
            f"{what} are not the same in all processes: {mine:.300} in process {index()}, "
            f"{first:.300} in process 0; start all of them alike, with the same files"
        )


def same_random_numbers() -> None:
    """Let Python and NumPy draw the same numbers in all processes from here on."""
    if count() > 1:
        _seed(random.randint(0, 2**32 - 1))


def _seed(number: int) -> None:
    """Seed what Keras on JAX draws its seeds from, as process 0 would."""
    number = from_first(number)
    random.seed(number)
    np.random.seed(number)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A scope that ends in all processes at once; what fails in one, fails in all.

    In it process 0 writes files, for which the others give it their share; see `go_on`.

    Raises:
        HostError: it has failed in another process; the error says how.
    """
    if count() == 1:
        yield
        return
    _state.depth += 1
    try:
        yield
        _meet()
    except HostError:
        raise
    except Exception as error:
        if _state.told is not error:
            _tell(error)
        raise
    finally:
        _state.depth -= 1


def _tell(error: Exception) -> None:
    """Tell the others of an error, at the next meeting, to which they may be unable to come."""
    _state.told = error
    _, why = _heard(f"{_FAULT}process {index()} has failed: {error}", _TELLING)
    _state.has_failed = bool(why)


def go_on() -> None:
    """In a `together` scope, before the processes compute something with each other.

    Raises:
        HostError: one of them has failed meanwhile.
    """
    if _state.depth:
        _meet()
