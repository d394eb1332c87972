"""The causal language model: backbone, head and preprocessor, a Keras model that takes strings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from puna import backend, distribution, samplers
from puna.backend.protocol import Tensor
from puna.checkpoint.model_card import ModelCard
from puna.checkpoint.variable_names import is_of_adapter, tensor_name
from puna.config import LlamaConfig
from puna.decoding.loop import Decoder
from puna.errors import TokenizerError
from puna.layers.cache import Cache
from puna.layers.linear import Linear
from puna.layers.matrix import MatrixLayer
from puna.models.adapting import Adaptable, adapters_from_config, adapters_to_config
from puna.models.backbone import Llama3Backbone
from puna.models.generating import Generating
from puna.models.preprocessor import Llama3CausalLMPreprocessor
from puna.models.quantizing import Quantizable
from puna.models.training import Trainable
from puna.models.vocabulary import ResizableVocabulary
from puna.quantization.scheme import Quantization, Scheme
from puna.text.tokenizer import Tokenizer

_HEAD = "lm_head"


class CausalLM(keras.Model):
    """The base of causal language models; `CausalLM.from_preset` picks the class."""

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike[str],
        load_weights: bool = True,
        dtype: Any = None,
        *,
        revision: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        quantization: Quantization | None = None,
        mesh: Sequence[int] | None = None,
        sharding: str | None = None,
        **kwargs: Any,
    ) -> Llama3CausalLM:
        """A model from a checkpoint, converted on the fly.

        Args:
            preset: a directory in Hugging Face's, Meta's or keras-hub's layout, or of a PEFT
                adapter, which names its base; a `.gguf` or `.safetensors` file;
                `hf://org/name[/file][@revision]`; or a name of `puna.checkpoint.hub.PRESETS`.
            load_weights: False makes random weights of the same shape.
            dtype: a dtype's name or a Keras dtype policy; None means the checkpoint's own dtype,
                and float32 for quantized GGUF files. Quantized matrices stay as they are.
            revision: a branch, tag or commit of the Hub, where the address names none.
            adapter: the directory or address of a PEFT adapter, merged into the weights.
            quantization: "int8", "int4", "float8", a `puna.quantization.scheme.Scheme`, or regular
                expressions for the names of matrices with a scheme each: the matrices are
                quantized while they are read, one at a time. None leaves them as the checkpoint
                has them: those in the compressed-tensors format, and in a GGUF file's Q8_0, Q4_0,
                Q4_1, Q4_K and Q6_K, stay packed, without loss, and are not trained. "none"
                dequantizes them, to be trained, saved or given an adapter. A checkpoint in the
                compressed-tensors format takes nothing else.
            mesh: how many devices share out the rows of a batch, and how many the weights, such as
                (2, 4): `keras.distribution` is set so, with `Llama3Backbone.get_layout_map`. None
                means as it is set, perhaps on one device. On JAX only.
            sharding: "auto" chooses the mesh by the devices and the model's size; None does not.
            **kwargs: `preprocessor=None` leaves out the tokenizer; anything else goes to the
                constructor.

        Raises:
            PresetError: the preset is not there, or its files are broken or do not fit.
            ConfigError: the configuration asks for what we do not compute, or there are too few
                devices.
            BackendError: several devices are asked for, and the backend is not JAX.
        """
        devices = distribution.Devices(mesh, sharding)
        from puna.models.presets import load_causal_lm

        return load_causal_lm(
            Llama3CausalLM,
            preset,
            load_weights,
            dtype,
            revision,
            adapter,
            quantization,
            devices,
            kwargs,
        )


@keras.saving.register_keras_serializable(package="puna")
class Llama3CausalLM(Trainable, Generating, ResizableVocabulary, Adaptable, Quantizable, CausalLM):
    """A Llama that predicts the next token.

    Called on `{"token_ids", "padding_mask"}`, each `[B, T]`, it returns logits `[B, T, V]` in
    float32; `Llama3Backbone` has what else inputs may say. `generate`, `fit`, `evaluate` and
    `predict` take text where it has a preprocessor.

    Args:
        backbone: a `Llama3Backbone`.
        preprocessor: turns strings into arrays; None leaves arrays to the caller.
        name: the model's name.
        generation_config: the contents of the checkpoint's `generation_config.json`, kept for
            `save_to_preset`. So is the attribute `card`, a `puna.checkpoint.model_card.ModelCard`.
        head_scheme: how the head is quantized, where it has a matrix of its own.
        head_adapters: what `get_config` says of LoRA adapters of the head.
    """

    def __init__(
        self,
        backbone: Llama3Backbone,
        preprocessor: Llama3CausalLMPreprocessor | None = None,
        *,
        name: str = "llama3_causal_lm",
        trainable: bool = True,
        generation_config: dict[str, Any] | None = None,
        head_scheme: Scheme | dict[str, Any] | None = None,
        head_adapters: dict[str, Any] | None = None,
    ):
        super().__init__(dtype=backbone.dtype_policy, name=name, trainable=trainable)
        self.backbone = backbone
        self.preset = backbone.preset
        self.preprocessor = preprocessor
        self.sampler: samplers.Sampler = samplers.TopKSampler(k=5)
        self.generation_config: dict[str, Any] = dict(generation_config or {})
        self.card = ModelCard()
        self.lm_head = None
        if not self.config.tie_word_embeddings:
            self.lm_head = Linear(
                self.config.hidden_size,
                self.config.vocab_size,
                initializer_range=self.config.initializer_range,
                out_dtype="float32",
                name="lm_head",
                dtype=self.dtype_policy,
            )
            self.set_schemes({_HEAD: head_scheme} if head_scheme else {})
        self._decoder = Decoder(self)
        self._add_metric()
        with distribution.building(self):
            self.build()
        self._know(backbone)
        backbone._know(self)
        if head_adapters:
            adapters_from_config(self._head(), head_adapters)
        if self.adapters():
            self.settle()

    @property
    def config(self) -> LlamaConfig:
        """The backbone's shape."""
        return self.backbone.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The preprocessor's tokenizer."""
        return self._require_preprocessor("tokenizer").tokenizer

    def build(self, input_shape=None):
        if self.lm_head is not None:
            self.lm_head.build(input_shape)

    def call(self, inputs: Any, training: bool = False) -> Tensor:
        """Logits `[B, T, V]` in float32, of whole sequences."""
        x_BTD = self.backbone(inputs, training=training)
        # In a step the loss takes hidden states, and computes logits of some at a time.
        return x_BTD if self._is_stepping else self._logits(x_BTD, training)

    def step(
        self,
        token_ids_BT: Tensor,
        start_B: Tensor,
        cache: Cache,
        last_B: Tensor | None,
        length_B: Tensor | None = None,
    ) -> tuple[Tensor | None, Cache]:
        """T tokens more of each row, with a cache; logits of one position of each row at most.

        Args:
            token_ids_BT: int [B, T].
            start_B: int [B], the position of each row's first new token.
            cache: from `puna.layers.cache.empty_cache` or an earlier step; it is consumed.
            last_B: int [B], the places in 0..T-1 whose logits are wanted; None wants none.
            length_B: int [B], each row's tokens in all, later chunks of its prompt counted in, by
                which dynamic RoPE scaling goes; None means up to `last_B`, or all T.

        Returns:
            Float32 `[B, V]` or None, and the cache with the new tokens in it.
        """
        if length_B is None and last_B is not None:
            length_B = start_B + last_B + 1
        x_BTD, cache = self.backbone.step(token_ids_BT, start_B, cache, length_B)
        if last_B is None:
            return None, cache
        x_B1D = ops.take_along_axis(x_BTD, ops.cast(last_B, "int32")[:, None, None], axis=1)
        # A sampler looks at all of a row's logits, many times.
        return backend.ops.whole_logits(self._logits(x_B1D)[:, 0]), cache

    def shift(self, cache: Cache, drop_B: Tensor, keep: Tensor) -> Cache:
        """See `Llama3Backbone.shift`."""
        return self.backbone.shift(cache, drop_B, keep)

    def step_all(
        self, token_ids_BT: Tensor, start_B: Tensor, cache: Cache, length_B: Tensor
    ) -> tuple[Tensor, Cache]:
        """As `step`, with the logits `[B, T, V]` of all positions."""
        x_BTD, cache = self.backbone.step(token_ids_BT, start_B, cache, length_B)
        return backend.ops.whole_logits(self._logits(x_BTD)), cache

    def _logits(self, x_BTD: Tensor, training: bool = False) -> Tensor:
        if self.lm_head is None:
            return self.backbone.embed_tokens.logits(x_BTD)
        return self.lm_head.call(x_BTD, training)

    def head_variables(self) -> list[Any]:
        """The variables that make logits of hidden states."""
        head = self.backbone.embed_tokens if self.lm_head is None else self.lm_head
        return list(head.weights)

    def _head(self) -> dict[str, Linear]:
        return {} if self.lm_head is None else {_HEAD: self.lm_head}

    def compute_output_spec(self, inputs: Any, training: bool = False) -> keras.KerasTensor:
        """The logits' shape and dtype, for functional models."""
        hidden = self.backbone.compute_output_spec(inputs)
        return keras.KerasTensor((*hidden.shape[:-1], self.config.vocab_size), "float32")

    def matrices(self) -> dict[str, MatrixLayer]:
        """See `Llama3Backbone.matrices`; the head is there where it has a matrix of its own."""
        return self.backbone.matrices() | self._head()

    def tensors(self) -> dict[str, Any]:
        """The variables under the checkpoint's names, such as `lm_head.weight`."""
        tensors = self.backbone.tensors()
        if self.lm_head is not None:
            root = self.lm_head.path or self.lm_head.name
            named = {f"lm_head.{tensor_name(v.path, root)}": v for v in self.lm_head.weights}
            tensors |= {name: v for name, v in named.items() if not is_of_adapter(name)}
        return tensors

    def _require_preprocessor(self, what: str) -> Llama3CausalLMPreprocessor:
        if self.preprocessor is None:
            raise TokenizerError(
                f"the model has no {what}; give Llama3CausalLM(backbone, preprocessor) one, or "
                "pass token ids"
            )
        return self.preprocessor

    def save_to_preset(
        self, preset_dir: str | os.PathLike[str], adapter: str | None = None, **kwargs: Any
    ) -> None:
        """Write the model as a Hugging Face directory; see `puna.checkpoint.save`.

        Args:
            preset_dir: a directory; what it held of an earlier save is replaced, all at once.
            adapter: what becomes of LoRA adapters in use: "merged" into the weights that are
                written (those in memory stay), or "only" the adapter, with the tokenizer, as PEFT
                has it. None means "merged"; beside quantized matrices "only" has to be asked for.
            **kwargs: `max_shard_size`, in bytes.

        Raises:
            ConfigError: adapters are beside quantized matrices and not "only" is asked for, or
                "only" is and not one is in use.
            PresetError: the directory cannot be written.
        """
        from puna.models.presets import save_causal_lm

        save_causal_lm(self, preset_dir, adapter, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Everything that the constructor needs, as JSON."""
        serialize, head = keras.saving.serialize_keras_object, self.quantization().get(_HEAD)
        return {
            "backbone": serialize(self.backbone),
            "preprocessor": serialize(self.preprocessor),
            "name": self.name,
            "trainable": self.trainable,
            "generation_config": dict(self.generation_config),
            "head_scheme": head.to_config() if head else None,
            "head_adapters": adapters_to_config(self._head()),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects=None) -> Llama3CausalLM:
        """The inverse of `get_config`."""
        deserialize = keras.saving.deserialize_keras_object
        parts = {
            part: deserialize(config[part], custom_objects=custom_objects)
            for part in ("backbone", "preprocessor")
        }
        return cls(**(config | parts))
