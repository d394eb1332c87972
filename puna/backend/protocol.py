"""What each backend's module offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from puna.backend.packed import Packed

Tensor = Any  # jax.Array, torch.Tensor or tf.Tensor


class Place(NamedTuple):
    """Where a step's new tokens stand in the cache, and what they may look at."""

    write: Any  # what `cache_write` takes, in the backend's own form
    live: int  # only the first so many places of the cache are looked at
    mask_B1TS: Tensor | None  # over those, true where a query may look; None where all look at all
    start_B: Tensor  # int32, where each row's new tokens begin


class BlockWeights(NamedTuple):
    """All that a plain block computes with; matrices are `(out, in)`."""

    attention_norm: Tensor
    mlp_norm: Tensor
    query: Tensor | Packed
    key: Tensor | Packed
    value: Tensor | Packed
    out: Tensor | Packed
    gate: Tensor | Packed
    up: Tensor | Packed
    down: Tensor | Packed

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """The two norms' weights [D]."""
        return self[:2]

    @property
    def matrices(self) -> tuple[Tensor | Packed, ...]:
        """The seven matrices."""
        return self[2:]


class BackendOps(Protocol):
    """The functions of `puna.backend.jax`, `.torch` and `.tensorflow`."""

    # How many tokens a call of a compiled step can make, and whether it returns before they are
    # made, so that the next call can be under way while the host reads.
    TOKENS_PER_CALL: int
    RUNS_AHEAD: bool

    # How many new tokens, of all rows, `call_blocks` takes at most.
    BLOCKS_CALL_TOKENS: int

    def value(self, variable: Any, dtype: str | None = None) -> Tensor:
        """What a Keras variable holds now, in its own dtype or in another."""
        ...

    def linear(self, x: Tensor, weight: Tensor | Packed, out_dtype: str) -> Tensor:
        """Multiply `x` [..., in] by the transpose of `weight` [out, in], sums in float32.

        `x` is taken in the dtype of `weight`; the result [..., out] has `out_dtype`.
        """
        ...

    def linears(
        self, x: Tensor, weights: Sequence[Tensor | Packed], out_dtype: str
    ) -> tuple[Tensor, ...]:
        """`linear` with each of several weights of one kind, packed or not.

        For packed weights, `x` is taken as it is.
        """
        ...

    def gated(
        self, x: Tensor, gate: Tensor | Packed, up: Tensor | Packed, out_dtype: str
    ) -> Tensor:
        """`silu(linear(x, gate)) · linear(x, up)`; `gate` and `up` have one shape and kind."""
        ...

    def head_loss(
        self,
        head: Callable[[Tensor], Tensor],
        variables: Sequence[Any],
        x_ND: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        rows: int,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of a head's guesses, of some rows at a time, with its gradients.

        Args:
            head: hidden states [R, D] to logits [R, V].
            variables: all that `head` reads.
            x_ND: hidden states.
            labels_N: int, what is right.
            weights_N: float32; rows of weight 0 cost nothing.
            rows: how many logits are computed at a time.
            training: whether gradients are wanted.

        Returns:
            Sums of `loss · weight`, which has gradients, and of the weights of right guesses.
        """
        ...

    def accumulated_step(self, model: Any, parts: int, *arguments: Any) -> Any:
        """One training step, with the gradients of some rows of the batch at a time.

        Each part's loss, a mean over its tokens' weights, counts by its share of the batch's
        weights: sums of losses and gradients are those of the whole batch.

        Args:
            model: a compiled Keras model, whose loss is such a mean.
            parts: how many parts the rows are cut into.
            *arguments: what Keras gives the model's `train_step`.

        Returns:
            What `train_step` returns.
        """
        ...

    def embed(self, weight: Tensor | Packed, token_ids: Tensor) -> Tensor:
        """Rows of `weight` [V, D] in its own dtype: int [B, T] to [B, T, D].

        Those of a packed weight are in float32.
        """
        ...

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Logits [..., V] as a sampler takes them: all on every device, of several."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Divide by the root mean square of the last axis, times `weight` [D], in float32.

        The result has the dtype of `x` [..., D].
        """
        ...

    def silu(self, x: Tensor) -> Tensor:
        """`x · sigmoid(x)`."""
        ...

    def rotate(self, x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
        """`x · cos` plus, with the halves of each head exchanged, `x · sin`, in float32.

        The result has the dtype of `x`.
        """
        ...

    def split_heads(self, x_BTF: Tensor, head_size: int) -> Tensor:
        """`[B, T, heads · H]` to `[B, heads, T, H]`."""
        ...

    def merge_heads(self, x_BNTH: Tensor) -> Tensor:
        """`[B, heads, T, H]` to `[B, T, heads · H]`."""
        ...

    def attention(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask_B1TS: Tensor | None,
        scale: float,
        dropout: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Softmax attention over grouped heads, in the query's dtype [B, N, T, H].

        Query head n reads key head n // (N / K). The mask is true where a query may look; each
        query must be allowed to look somewhere. With no mask, all look everywhere. `dropout` is
        applied to the softmax's weights.
        """
        ...

    def attend(
        self,
        projected: Sequence[Tensor],
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        place: Place,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        """A few new tokens' attention in one native call, or None where that is not to be had.

        Args:
            projected: queries [B, T, N · H], keys and values [B, T, K · H], before they are turned.
            rotary: what `rotate` takes.
            cache: keys and values [B, K, S, H]; it must not be used afterwards.
            place: where the tokens stand.

        Returns:
            What comes out, [B, T, N · H], and the cache with the new keys and values in it.
        """
        ...

    def call_block(
        self,
        block: Any,
        like: Any,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Any,
        place: Place,
    ) -> tuple[Tensor, Any]:
        """`block.call(...)` in a compiled step.

        Where `like` is a block of the same form, by its variables and `constants()`, a backend may
        trace that one for both.
        """
        ...

    def call_blocks(
        self,
        blocks: Callable[[], Sequence[BlockWeights] | None],
        epsilon: float,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Sequence[tuple[Tensor, Tensor]],
        place: Place,
    ) -> tuple[Tensor, Sequence[tuple[Tensor, Tensor]]] | None:
        """A few new tokens through all blocks in one native call, or None where there is none.

        Args:
            blocks: gives what each computes with, if all are plain; in a compiled step the result
                may be kept for as long as the step's variables have the same memory.
            epsilon: the norms'.
            x_BTD: what goes into the first block.
            rotary: what `rotate` takes.
            cache: of each block keys and values [B, K, S, H]; they must not be used afterwards.
            place: where the tokens stand.

        Returns:
            What comes out of the last block, and the caches with the new keys and values in them.
        """
        ...

    def cache_dtype(self, compute_dtype: str, wanted: str | None = None) -> str:
        """The dtype in which keys and values of `compute_dtype` are kept.

        `wanted` is a float's name; None wants what is fastest. The result may be an integer of the
        same size, which holds the bits.
        """
        ...

    def cache_read(self, cache_BKSH: Tensor, dtype: str) -> Tensor:
        """Keys or values as numbers, for queries of a dtype; they may be wider than that."""
        ...

    def place(self, start_B: Tensor, T: int, capacity: int) -> Place:
        """The place of T tokens at positions `start[b] + 0..T-1` of row b; once for all layers."""
        ...

    def cache_write(self, cache_BKSH: Tensor, new_BKTH: Tensor, write: Any) -> Tensor:
        """Put `new` where `Place.write` says; the old cache must not be used."""
        ...

    def while_loop(
        self, goes_on: Callable[..., Tensor], body: Callable[..., Any], state: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """`state = body(*state)` as long as `goes_on(*state)`, inside a compiled step."""
        ...

    def cond(
        self, predicate: Tensor, if_true: Callable[[], Any], if_false: Callable[[], Any]
    ) -> Any:
        """`if_true()` or `if_false()`, inside a compiled step."""
        ...

    def switch(self, index: Tensor, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
        """`branches[index](*operands)`, inside a compiled step."""
        ...

    def to_device(self, array: np.ndarray) -> Tensor:
        """The array as a tensor, with nothing compiled; it must not be written to afterwards."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Zeros that a compiled step may take over."""
        ...

    def gather_rows(
        self, sources: Sequence[tuple[Tensor, int] | None], shape: tuple[int, int, int, int]
    ) -> Tensor:
        """A new array [B, K, S, H], row b from a row of another [_, K, _, H], or zeros.

        As much of the third axis is taken as both have; what is left is zeros. At least one source
        is given, and the dtype is its.
        """
        ...

    def prepare(self, variable: Any, array: np.ndarray) -> Any:
        """An array as `initialize` takes it for a variable, in its dtype; runs in any thread.

        Where a distribution is set, only what this process's devices hold is read.

        Returns:
            Something that uses the array's own memory where that will do, else a copy.
        """
        ...

    def initialize(self, variable: Any, prepared: Any) -> None:
        """Give a Keras variable its first value, without a copy where the backend allows it.

        The array's memory may become the variable's: nobody may write to it afterwards. When this
        returns, the array has been read unless it is kept.
        """
        ...

    def keeps(self, prepared: Any, array: np.ndarray) -> bool:
        """Whether a variable that got what was prepared of an array goes on using its memory."""
        ...

    def initialize_at_random(self, variable: Any) -> None:
        """Give a variable that was built without memory its initializer's value."""
        ...

    def assign(self, variable: Any, array: np.ndarray) -> None:
        """Give a variable another value."""
        ...

    def to_numpy(self, variable: Any) -> np.ndarray:
        """The variable's value in its own dtype (ml_dtypes for bfloat16), not to be written to.

        Where it is on several devices, it is gathered, and nothing of that is kept with it.
        """
        ...

    def gathered(self, tensor: Tensor) -> np.ndarray:
        """As `to_numpy`, of a tensor that is no variable's."""
        ...

    def compile_step(
        self, function: Callable[..., Any], variables: Sequence[Any], donate: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """`function` of tensors, compiled for each new set of shapes, without gradients.

        Args:
            function: reads `variables` and its arguments, changes nothing.
            variables: Keras variables whose current values each call uses.
            donate: positions of arguments whose memory the call may take over.
        """
        ...
