"""The backbone: embedding, blocks and the last norm."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from puna import backend, distribution
from puna.backend.protocol import BlockWeights, Place, Tensor
from puna.checkpoint.variable_names import is_of_adapter, tensor_name
from puna.config import LlamaConfig
from puna.layers.block import Block
from puna.layers.cache import Cache, LayerCache, capacity_of
from puna.layers.embedding import Embedding
from puna.layers.matrix import MatrixLayer
from puna.layers.rms_norm import RMSNorm
from puna.layers.rope import RotaryEmbedding, rotate
from puna.models.adapting import Adaptable, adapters_from_config, adapters_to_config
from puna.models.quantizing import Quantizable
from puna.quantization.scheme import Quantization, Scheme


@keras.saving.register_keras_serializable(package="puna")
class Llama3Backbone(Adaptable, Quantizable, keras.Model):
    """A Llama without its head: token ids to hidden states.

    The inputs are `{"token_ids": int [B, T], "padding_mask": bool [B, T]}`, or the token ids alone.
    Hidden states are `[B, T, D]` in the compute dtype. Positions count the tokens of the mask, so
    padding may stand on either side.

    Where several texts share a row, `"segment_ids"`, int [B, T], numbers them: no token sees those
    of another number, and positions begin anew in each. `"positions"`, int [B, T], gives positions
    of one's own. Each may be there without the other.

    Args:
        config: the model's shape; or else keras-hub's arguments, from `vocabulary_size` to
            `tie_word_embeddings` (see `LlamaConfig.from_keras_hub`).
        dtype: a dtype's name or a Keras dtype policy; None means Keras's own default.
        name: the layer's name.
        quantization: the names of matrices that are quantized, and how; `quantize` does it to a
            model that has weights.
        adapters: what `get_config` says of LoRA adapters; `enable_lora` makes them.

    Example:
    >>> import numpy as np
    >>> backbone = Llama3Backbone(
    ...     vocabulary_size=32, num_layers=1, num_query_heads=2, hidden_dim=8,
    ...     intermediate_dim=16, num_key_value_heads=1,
    ... )
    >>> backbone(np.array([[3, 1, 4]])).shape[-1]
    8
    """

    _default_targets = ("q_proj", "v_proj")

    remat = False  # whether training computes blocks again for their gradients

    def __init__(
        self,
        *args: Any,
        config: LlamaConfig | None = None,
        dtype: Any = None,
        name: str = "model",
        trainable: bool = True,
        quantization: Mapping[str, Scheme | dict[str, Any]] | None = None,
        adapters: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(dtype=dtype, name=name, trainable=trainable)
        if config is None:
            config = LlamaConfig.from_keras_hub(*args, **kwargs)
        elif args or kwargs:
            raise TypeError(f"beside config, these are not taken: {[*args, *kwargs]}")
        self.config = config
        policy, D = self.dtype_policy, config.hidden_size
        self.embed_tokens = Embedding(
            config.vocab_size,
            D,
            initializer_range=config.initializer_range,
            name="embed_tokens",
            dtype=policy,
        )
        # Keras has a `layers` of its own, and a dot in a name breaks torch: hence "layers_3".
        self.transformer_layers = [
            Block(config, name=f"layers_{i}", dtype=policy) for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(D, epsilon=config.rms_norm_eps, name="norm", dtype=policy)
        self.rotary = RotaryEmbedding(config.rope, config.head_size, config.max_position_embeddings)
        self.set_schemes(quantization or {})
        with distribution.building(self):
            self.build()
        if adapters:
            adapters_from_config(self.linears(), adapters)
            self.settle()

    def build(self, input_shape=None):
        for layer in (self.embed_tokens, *self.transformer_layers, self.norm):
            layer.build(input_shape)

    def call(self, inputs: Any, training: bool = False) -> Tensor:
        """Hidden states `[B, T, D]` of whole sequences."""
        return self._whole(inputs, training=training)

    def intercepted(self, inputs: Any, intercept: Callable[[Tensor, int], Tensor] | None) -> Tensor:
        """As `call`, with what `intercept` makes of the hidden states after each place.

        Args:
            inputs: as in `call`.
            intercept: given hidden states `[B, T, D]` and the number of the block they come from,
                -1 for the embedding, returns what goes on.
        """
        return self._whole(inputs, intercept=intercept)

    def _whole(self, inputs: Any, **options: Any) -> Tensor:
        """Hidden states of whole sequences, with options of `_run`."""
        token_ids_BT, mask_BT = _split_inputs(inputs)
        segments_BT, positions_BT = _packing(inputs)
        mask_B1TT = _causal_mask(mask_BT, segments_BT)
        if positions_BT is None and segments_BT is None:
            positions_BT = ops.maximum(ops.cumsum(ops.cast(mask_BT, "int32"), axis=1) - 1, 0)
        elif positions_BT is None:
            # A token's position is the number of those before it that it sees.
            positions_BT = ops.sum(ops.cast(mask_B1TT[:, 0], "int32"), axis=-1) - 1
        x_BTD, _ = self._run(token_ids_BT, positions_BT, mask_B1TT, **options)
        return x_BTD

    def step(
        self,
        token_ids_BT: Tensor,
        start_B: Tensor,
        cache: Cache,
        length_B: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Hidden states of T tokens more, after the first `start_B` positions of the cache.

        Args:
            token_ids_BT: int [B, T].
            start_B: int [B], the position of each row's first new token.
            cache: it is consumed: use the one that is returned.
            length_B: int [B], each row's tokens so far, where fewer than T of the new are real.
        """
        T, S = token_ids_BT.shape[1], capacity_of(cache)
        positions_BT = start_B[:, None] + ops.arange(T, dtype="int32")
        # What lies beyond a row's own position is of padding or of an earlier use: it is masked.
        place = backend.ops.place(start_B, T, S)
        return self._run(token_ids_BT, positions_BT, place.mask_B1TS, cache, place, length_B)

    def shift(self, cache: Cache, drop_B: Tensor, keep: Tensor) -> Cache:
        """The cache without the `drop_B` tokens after the first `keep`; those behind move up.

        The keys that move are turned back by as many positions, as if the tokens that are dropped
        had never been (Xiao et al. 2023, arXiv:2309.17453, as llama.cpp does it).
        """
        S = capacity_of(cache)
        place_S = ops.arange(S, dtype="int32")
        moves_BS = ops.logical_and(place_S >= keep, drop_B[:, None] > 0)
        source_BS = ops.minimum(place_S + ops.where(moves_BS, drop_B[:, None], 0), S - 1)
        source_B1S1 = source_BS[:, None, :, None]
        cos, sin = self.rotary(-drop_B[:, None])
        scaling = self.rotary.rope.attention_scaling
        moves_B1S1 = moves_BS[:, None, :, None]
        shifted = []
        for old in cache:
            moved = type(old)(*(ops.take_along_axis(a, source_B1S1, axis=2) for a in old))
            key_BKSH, _ = moved.read(S, self.compute_dtype)
            turned_BKSH = rotate(key_BKSH, cos / scaling, sin / scaling)
            shifted.append(moved.replace_keys(ops.where(moves_B1S1, turned_BKSH, key_BKSH)))
        return tuple(shifted)

    def _run(
        self,
        token_ids_BT: Tensor,
        positions_BT: Tensor,
        mask_B1TS: Tensor | None,
        cache: Cache | None = None,
        place: Place | None = None,
        length_B: Tensor | None = None,
        training: bool = False,
        intercept: Callable[[Tensor, int], Tensor] | None = None,
    ) -> tuple[Tensor, Cache]:
        x_BTD = self.embed_tokens.call(token_ids_BT)
        if intercept is not None:
            x_BTD = intercept(x_BTD, -1)
        rotary = self.rotary(positions_BT, length_B)
        if cache is not None and place is not None and intercept is None:
            done = self._call_blocks(x_BTD, rotary, cache, place)
            if done is not None:
                x_BTD, cache = done
                return self.norm.call(x_BTD), cache
        new_cache = []
        for i, block in enumerate(self.transformer_layers):
            layer_cache = None if cache is None else cache[i]
            if place is not None:
                like = self.transformer_layers[0]
                x_BTD, layer_cache = backend.ops.call_block(
                    block, like, x_BTD, rotary, layer_cache, place
                )
            else:
                x_BTD = self._call_block(block, x_BTD, rotary, mask_B1TS, training)
            new_cache.append(layer_cache)
            if intercept is not None:
                x_BTD = intercept(x_BTD, i)
        return self.norm.call(x_BTD), tuple(new_cache)

    def _call_block(
        self, block: Block, x_BTD: Tensor, rotary: Any, mask_B1TS: Tensor | None, training: bool
    ) -> Tensor:
        """What one block makes of whole sequences."""

        def call(x_BTD: Tensor) -> Tensor:
            return block.call(x_BTD, rotary, mask_B1TS, training=training)[0]

        return keras.remat(call)(x_BTD) if training and self.remat else call(x_BTD)

    def _call_blocks(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache, place: Place
    ) -> tuple[Tensor, Cache] | None:
        """All blocks in one native call, where that can be."""
        if x_BTD.shape[0] * x_BTD.shape[1] > backend.ops.BLOCKS_CALL_TOKENS:
            return None
        layers = [layer for layer in cache if isinstance(layer, LayerCache)]
        if len(layers) < len(cache):
            return None
        epsilon = self.config.rms_norm_eps
        done = backend.ops.call_blocks(self._plain_weights, epsilon, x_BTD, rotary, layers, place)
        return done and (done[0], tuple(LayerCache(*layer) for layer in done[1]))

    def _plain_weights(self) -> list[BlockWeights] | None:
        """What each block computes with, where all are plain."""
        found = [block.plain_weights() for block in self.transformer_layers]
        weights = [block for block in found if block is not None]
        return weights if len(weights) == len(found) else None

    def compute_output_spec(self, inputs: Any, training: bool = False) -> keras.KerasTensor:
        """The hidden states' shape and dtype, for functional models."""
        token_ids, _ = _split_inputs(inputs)
        shape = (*token_ids.shape, self.config.hidden_size)
        return keras.KerasTensor(shape, self.compute_dtype)

    @property
    def token_embedding(self) -> Embedding:
        """keras-hub's name of `embed_tokens`."""
        return self.embed_tokens

    @property
    def layer_norm(self) -> RMSNorm:
        """keras-hub's name of `norm`."""
        return self.norm

    def matrices(self) -> dict[str, MatrixLayer]:
        """The layers that can be quantized, under names such as `model.layers.0.mlp.up_proj`."""
        found: dict[str, MatrixLayer] = {"model.embed_tokens": self.embed_tokens}
        for i, block in enumerate(self.transformer_layers):
            for part in (block.self_attn, block.mlp):
                for layer in part._flatten_layers(include_self=False):
                    if isinstance(layer, MatrixLayer):
                        found[f"model.layers.{i}.{part.name}.{layer.name}"] = layer
        return found

    def tensors(self) -> dict[str, Any]:
        """The variables under the checkpoint's names, such as `model.norm.weight`."""
        root = self.path or self.name
        names = {f"model.{tensor_name(v.path, root)}": v for v in self.weights}
        return {name: v for name, v in names.items() if not is_of_adapter(name)}

    def get_config(self) -> dict[str, Any]:
        """Everything that the constructor needs, as JSON."""
        return {
            "config": self.config.to_hf(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
            "quantization": {name: s.to_config() for name, s in self.quantization().items()},
            "adapters": adapters_to_config(self.linears()),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects=None) -> Llama3Backbone:
        """The inverse of `get_config`."""
        del custom_objects
        others = {name: value for name, value in config.items() if name != "config"}
        return cls(config=LlamaConfig.from_hf(config["config"]), **others)

    @classmethod
    def get_layout_map(
        cls,
        device_mesh: Any,
        model_parallel_dim_name: str = distribution.MODEL,
        data_parallel_dim_name: str = distribution.BATCH,
        fsdp: bool = False,
    ) -> Any:
        """How a Llama's weights lie on several devices, for `keras.distribution.ModelParallel`.

        Heads of q, k and v, features of gate and up, and the vocabulary are cut along the model
        axis, o and down along their inputs; adapters, quantized numbers and scales follow their
        matrix. Norms are on every device. So is what the axis does not divide, of which loading
        warns: no head is ever cut.

        Args:
            device_mesh: a `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: its axis that shares out the weights.
            data_parallel_dim_name: its axis that shares out the rows of a batch.
            fsdp: whether matrices are cut along that axis too, and gathered as they are used: less
                memory for training, more traffic (Zhao et al. 2023, arXiv:2304.11277).

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            BackendError: the backend is not JAX.
            ConfigError: the mesh has no such axes.
        """
        return distribution.layout_map(
            device_mesh, model_parallel_dim_name, data_parallel_dim_name, fsdp
        )

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike[str],
        load_weights: bool = True,
        dtype: Any = None,
        revision: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        quantization: Quantization | None = None,
        mesh: Sequence[int] | None = None,
        sharding: str | None = None,
    ) -> Llama3Backbone:
        """The backbone of a preset; see `Llama3CausalLM.from_preset`."""
        devices = distribution.Devices(mesh, sharding)
        from puna.models.presets import load_backbone

        return load_backbone(
            cls, preset, load_weights, dtype, revision, adapter, quantization, devices
        )


def _split_inputs(inputs: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask from a dict, or from ids alone."""
    if isinstance(inputs, dict):
        token_ids, mask = inputs["token_ids"], inputs.get("padding_mask")
    else:
        token_ids, mask = inputs, None
    token_ids = ops.convert_to_tensor(token_ids)
    mask = ops.ones_like(token_ids, "bool") if mask is None else ops.cast(mask, "bool")
    return ops.cast(token_ids, "int32"), mask


def _packing(inputs: Any) -> tuple[Tensor | None, Tensor | None]:
    """The segments and positions of packed rows, where they are given."""
    given = inputs if isinstance(inputs, dict) else {}
    segments, positions = given.get("segment_ids"), given.get("positions")
    return (
        None if segments is None else ops.cast(ops.convert_to_tensor(segments), "int32"),
        None if positions is None else ops.cast(ops.convert_to_tensor(positions), "int32"),
    )


def _causal_mask(mask_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
    """True, [B, 1, T, T], where a query may look: itself, and real tokens before it in its text."""
    T = ops.shape(mask_BT)[1]
    place_T = ops.arange(T, dtype="int32")
    before_TT = place_T[None, :] <= place_T[:, None]
    # Padding looks at itself, so that no softmax is over nothing.
    itself_TT = place_T[None, :] == place_T[:, None]
    seen_BTT = before_TT & mask_BT[:, None, :]
    if segments_BT is not None:
        seen_BTT = seen_BTT & (segments_BT[:, None, :] == segments_BT[:, :, None])
    return (itself_TT | seen_BTT)[:, None]
