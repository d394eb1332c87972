"""`compile`, `fit`, `evaluate` and `predict` of a causal language model, and its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import keras
from keras import ops, tree  # pyright: ignore

from puna import backend, samplers
from puna.backend import build, hosts
from puna.backend.even_batches import EvenBatches, evened, real_rows
from puna.backend.protocol import Tensor
from puna.backend.step_loss import counting_rows, weigh_by_rows
from puna.errors import ConfigError
from puna.tuning.data import Preprocessed

if TYPE_CHECKING:
    from puna.models.causal_lm import Llama3CausalLM

AUTO = "auto"

# Logits that are held at a time while a loss is computed, in bytes of float32.
_LOGITS_BYTES = 32 << 20


class Trainable:
    """The part of a causal LM that is trained: on text, with a loss that never has all logits."""

    compiled: bool
    optimizer: Any
    trainable_variables: list[Any]

    _sums_loss = False  # whether loss and metrics are the model's own
    _is_stepping = False  # whether Keras calls the model for its loss
    _parts = 1  # that a batch's gradients are computed in
    _right: keras.metrics.Mean  # made by `_add_metric`

    def _add_metric(self) -> None:
        """To be called before the model is built, as Keras takes no metric later."""
        self._right = keras.metrics.Mean(name="accuracy")

    def compile(
        self,
        optimizer: Any = AUTO,
        loss: Any = AUTO,
        *,
        weighted_metrics: Any = AUTO,
        sampler: str | samplers.Sampler = "top_k",
        remat: bool = False,
        accumulate: int = 1,
        **kwargs: Any,
    ) -> None:
        """Keras's `compile`, with defaults for fine-tuning, and the sampler of `generate`.

        With the defaults of `loss`, `weighted_metrics` and `metrics`, a step computes the logits of
        some tokens at a time, of those alone that have a weight, and makes their gradients at once:
        `[B, T, V]` is never held. Any other loss or metric gets it, as Keras has it.

        Args:
            optimizer: "auto" is Adam with a learning rate of 2e-5.
            loss: "auto" is cross-entropy, averaged over the tokens that have a weight.
            weighted_metrics: "auto" is the share of tokens that are predicted.
            sampler: a `puna.samplers.Sampler` or a name of one.
            remat: whether a training step keeps no more than what goes into each block, and
                computes the block again for its gradients: slower, in much less memory.
            accumulate: how many parts a training step cuts its batch into. Their gradients are
                computed one after another and summed, each part weighed by its share of the
                tokens: loss, gradients and step are the whole batch's, in the memory of a part.
                (An optimizer's `gradient_accumulation_steps` makes one step of several batches,
                which all weigh the same however many tokens they have.) It takes the default loss.
            **kwargs: as Keras has them.

        Raises:
            ConfigError: `accumulate` is no whole number from 1 on, or beside a loss, a metric or a
                `compute_loss` of one's own, of which nobody knows what it is a mean over.
        """
        model = cast("Llama3CausalLM", self)
        if optimizer == AUTO:
            optimizer = keras.optimizers.Adam(2e-5)
        sums_loss = loss == AUTO and weighted_metrics == AUTO and not kwargs.get("metrics")
        self._check_accumulate(accumulate, sums_loss)
        self._sums_loss = sums_loss
        if loss == AUTO:
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            )
        if self._sums_loss:
            weighted_metrics = None
        elif weighted_metrics == AUTO:
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        for variable in self._right.variables:
            if not build.is_initialized(variable):  # the model was made to be loaded
                backend.ops.initialize_at_random(variable)
        model.sampler = samplers.get(sampler)
        model.backbone.remat = remat
        self._parts = accumulate
        super().compile(  # type: ignore[misc]
            optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs
        )
        weigh_by_rows(cast("Any", self))

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Keras's, with that of the model's own loss only where that is computed."""
        found = super().metrics  # type: ignore[misc]
        return found if self._sums_loss else [m for m in found if m is not self._right]

    def get_compile_config(self) -> dict[str, Any] | None:
        """Keras's, with what `compile` takes more."""
        config = super().get_compile_config()  # type: ignore[misc]
        if config is None:
            return None
        model = cast("Llama3CausalLM", self)
        own: dict[str, Any] = {"sampler": samplers.to_config(model.sampler)}
        own |= {"remat": model.backbone.remat, "accumulate": self._parts}
        if self._sums_loss:
            own |= {"loss": AUTO, "weighted_metrics": AUTO}
        return config | own

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """The inverse of `get_compile_config`; optimizer state is loaded into what it makes."""
        sampler = samplers.from_config(config["sampler"])
        others = {name: value for name, value in config.items() if name != "sampler"}
        self.compile(**keras.saving.deserialize_keras_object(others), sampler=sampler)
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        """Keras's `fit`, on text too.

        Args:
            x: rows: strings, chats, prompts with completions and what else `puna.tuning.rows`
                knows, in a list, an array, a data frame, a data set of any library, a generator,
                or the `pathlib.Path` of a file; `puna.tuning.TextData` of rows, which can be
                packed and says what is learned; or arrays, as in Keras.
            y: labels of arrays; rows bring their own.
            **kwargs: as in Keras. `validation_data` takes what `x` takes; `batch_size` holds for
                all of it.

        Rows that had to be cut are counted, and the count is shown.

        Raises:
            DataError: rows are bad; it names the first of them.
        """
        model = cast("Llama3CausalLM", self)
        if not self.trainable_variables:
            model._check_unmerged("there is nothing to train")
        self._check_trainable_dtype()
        model._check_optimizer()
        self._compile_if_needed()
        with Preprocessed(model.preprocessor, "fit", x, y, kwargs) as data:
            return super().fit(**evened("fit", data))  # type: ignore[misc]

    def evaluate(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        """Keras's `evaluate`, on text too; see `fit`."""
        self._compile_if_needed()
        with Preprocessed(cast("Any", self).preprocessor, "evaluate", x, y, kwargs) as data:
            return super().evaluate(**evened("evaluate", data))  # type: ignore[misc]

    def predict(self, x: Any, **kwargs: Any) -> Any:
        """Keras's `predict`, on text too: logits `[B, T, V]`, a row for each of `x`."""
        with Preprocessed(cast("Any", self).preprocessor, "predict", x, None, kwargs) as data:
            data = evened("predict", data)
            found = super().predict(**data)  # type: ignore[misc]
            return data["x"].real(found) if isinstance(data["x"], EvenBatches) else found

    # One step

    def train_step(self, *arguments: Any) -> Any:
        """Keras's, with the model's own loss where `compile` was left to choose it."""
        with self._stepping(arguments[-1]):
            if self._parts > 1 and self.trainable_variables:
                return backend.ops.accumulated_step(self, self._parts, *arguments)
            return super().train_step(*arguments)  # type: ignore[misc]

    def test_step(self, *arguments: Any) -> Any:
        """As `train_step`."""
        with self._stepping(arguments[-1]):
            return super().test_step(*arguments)  # type: ignore[misc]

    def predict_step(self, *arguments: Any) -> Any:
        """Keras's; of several processes each gets what all of them have made."""
        found = super().predict_step(*arguments)  # type: ignore[misc]
        if hosts.count() == 1:
            return found
        outputs, others = found
        return tree.map_structure(backend.ops.whole_logits, outputs), others

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """Keras's; inside a step perhaps from hidden states instead of logits; see `compile`."""
        if not self._is_stepping:
            return super().compute_loss(  # type: ignore[misc]
                x, y, y_pred, sample_weight, training=training
            )
        model = cast("Llama3CausalLM", self)
        B, T, D = ops.shape(y_pred)
        weights_BT = ops.ones((B, T), "float32") if sample_weight is None else sample_weight
        labels_N, weights_N = (ops.reshape(a, (-1,)) for a in (y, weights_BT))
        weights_N = ops.cast(weights_N, "float32")
        loss, right = backend.ops.head_loss(
            lambda x_RD: model._logits(x_RD, training),
            model.head_variables(),
            ops.reshape(y_pred, (-1, D)),
            labels_N,
            weights_N,
            self._rows(B * T),
            training,
        )
        # A batch in which nothing has a weight has no loss.
        total = ops.maximum(ops.sum(weights_N), 1e-7)
        self._right.update_state(right / total, total)
        loss = loss / total
        for other in model.losses:
            loss = loss + ops.sum(ops.cast(other, loss.dtype))
        return loss

    def _rows(self, tokens: Any) -> int:
        """How many tokens' logits are held at a time: a whole number of 16, in pieces alike."""
        most = _LOGITS_BYTES // (4 * cast("Llama3CausalLM", self).config.vocab_size) // 16 * 16
        most = max(most, 16)
        if not isinstance(tokens, int):
            return most
        pieces = -(-tokens // most)
        return -(-tokens // pieces // 16) * 16 if tokens else 16

    @contextlib.contextmanager
    def _stepping(self, data: Any) -> Iterator[None]:
        head = cast("Llama3CausalLM", self).lm_head
        # What is dropped at random would have to be told apart from piece to piece.
        drops = head is not None and any(a.settings.dropout for a in head.in_use)
        self._is_stepping = self._sums_loss and self._has_own_loss and not drops
        try:
            with counting_rows(self, real_rows(data)):
                yield
        finally:
            self._is_stepping = False

    @property
    def _has_own_loss(self) -> bool:
        """Whether no subclass computes another."""
        return type(self).compute_loss is Trainable.compute_loss

    # Checks

    def _check_accumulate(self, parts: int, sums_loss: bool) -> None:
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
            raise ConfigError(f"accumulate is {parts!r}; expected a whole number from 1 on")
        if parts > 1 and not (sums_loss and self._has_own_loss):
            raise ConfigError(
                f"accumulate is {parts} beside a loss or metric of your own, which may be a mean "
                "over anything; leave loss, metrics and weighted_metrics out, or accumulate"
            )

    def _compile_if_needed(self) -> None:
        if not self.compiled:
            self.compile(sampler=cast("Llama3CausalLM", self).sampler)

    def _check_trainable_dtype(self) -> None:
        half = [v for v in self.trainable_variables if v.dtype in ("bfloat16", "float16")]
        if half:
            raise ConfigError(
                f"{len(half)} trainable variables are in {half[0].dtype}, where a step's change "
                "of a weight is mostly rounded away; load the model with "
                f"dtype='mixed_{half[0].dtype}' (float32 weights, the same products) or "
                "dtype='float32', or freeze what shall not be trained"
            )
