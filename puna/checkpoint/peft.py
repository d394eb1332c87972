"""PEFT's LoRA adapters, merged into a checkpoint while it is read.

W' = W + s · B @ A, or with DoRA m · W' / ‖W'‖, is computed in float32 a few rows at a time, and
rounded to the base's dtype.

Sources: LoRA, Hu et al. 2021 (arXiv:2106.09685); DoRA, Liu et al. 2024 (arXiv:2402.09353); PEFT
0.21's `tuners/lora/{layer,variants,dora}.py` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.peft_config import CONFIG, AdapterConfig
from puna.checkpoint.safetensors import SafetensorsSource
from puna.checkpoint.source import TensorInfo, TensorSource
from puna.checkpoint.torch_file import TorchFile
from puna.errors import PresetError

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_CHUNK = 1 << 20  # elements merged at a time: 4 MB of float32

# The end of a tensor's name, and what it is there for; the first that fits.
_SUFFIXES: tuple[tuple[str, str], ...] = (
    (".lora_A.weight", "A"),
    (".lora_B.weight", "B"),
    (".lora_B.bias", "B.bias"),
    (".lora_embedding_A", "embedding_A"),
    (".lora_embedding_B", "embedding_B"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    (".token_adapter.trainable_tokens_delta", "tokens"),
    (".base_layer.weight", "base.weight"),
    (".base_layer.bias", "base.bias"),
    (".weight", "weight"),
    (".bias", "bias"),
)


class PeftAdapter:
    """A LoRA adapter as PEFT saves it: its configuration, and its tensors by module and role.

    Args:
        directory: it holds `adapter_config.json` and `adapter_model.safetensors`, or
            `adapter_model.bin`.

    Attributes:
        config: what `adapter_config.json` says.
        modules: for each module, such as `model.layers.0.self_attn.q_proj`, the names of its
            tensors by their roles.

    Raises:
        PresetError: a file is missing or malformed, asks for what is not computed here, or holds a
            tensor that is of no LoRA.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory)
        self.config = AdapterConfig.read(self.path / CONFIG)
        files = [self.path / name for name in WEIGHTS if (self.path / name).is_file()]
        if not files:
            raise PresetError(
                f"{self.path} has neither {' nor '.join(WEIGHTS)}; fetch the adapter's weights"
            )
        is_torch = files[0].suffix == ".bin"
        self._source = TorchFile(files[0]) if is_torch else SafetensorsSource(files[0])
        self.modules: dict[str, dict[str, str]] = {}
        try:
            for name in self._source.names():
                self._add(name)
        except BaseException:
            self.close()
            raise

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one of the adapter's tensors."""
        return self._source.info(name)

    def read(self, name: str) -> np.ndarray:
        """One of the adapter's tensors, in float32."""
        return self._source.read(name).astype(np.float32)

    def close(self) -> None:
        """Close the files."""
        self._source.close()

    def _add(self, name: str) -> None:
        ending, role = next(((e, r) for e, r in _SUFFIXES if name.endswith(e)), ("", ""))
        if not name.startswith(PREFIX) or not role:
            raise PresetError(
                f"{self.path}: the tensor {name!r:.200} is of no LoRA adapter that is read; "
                "expected base_model.model.….lora_A.weight and its like: save it with PEFT"
            )
        roles = self.modules.setdefault(name[len(PREFIX) : -len(ending)], {})
        if role in roles:
            raise PresetError(f"{self.path}: {name!r:.200} and {roles[role]!r:.200} are one")
        roles[role] = name


@dataclass(frozen=True, slots=True)
class _Change:
    """What happens to one of the base's tensors: steps that apply in this order."""

    module: str
    original: str  # the base's name of the tensor
    full: str | None = None  # the adapter's tensor that stands in its place
    rows: tuple[str, tuple[int, ...]] | None = None
    left: tuple[str, bool] | None = None  # the factors, and whether they are transposed
    right: tuple[str, bool] | None = None
    addend: str | None = None
    magnitude: str | None = None
    by_column: bool = False


@dataclass
class MergedSource:
    """A checkpoint with an adapter merged in; a source like any other.

    Closing it closes the base and the adapter.

    Args:
        base: the checkpoint.
        adapter: the adapter.

    Raises:
        PresetError: the adapter has a tensor for what the base has not, or of another shape, or for
            a module that its configuration does not name; or a module that it names has none.
    """

    base: TensorSource
    adapter: PeftAdapter
    _changes: dict[str, _Change] = field(init=False, default_factory=dict)
    _infos: dict[str, TensorInfo] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = self.base.names()
        # A checkpoint of a bare backbone lacks the "model.".
        self._strip = "" if any(n.startswith("model.") for n in names) else "model."
        self._is_tied = not self._strip and f"{_HEAD}.weight" not in names
        for module, roles in self.adapter.modules.items():
            self._plan(module, roles)
        self._untie()
        self._check_targets()
        for name, change in self._changes.items():
            self._infos[name] = self._check(name, change)

    @property
    def config(self) -> dict[str, Any]:
        """Fields of `config.json` that the adapter changes: a head untied, a longer vocabulary."""
        changes: dict[str, Any] = {}
        if self._is_tied and f"{_HEAD}.weight" in self._changes:
            changes["tie_word_embeddings"] = False
        embedding = self._infos.get(self._ours(f"{_EMBEDDING}.weight"))
        if embedding is not None:
            changes["vocab_size"] = embedding.shape[0]
        return changes

    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return list(dict.fromkeys([*self.base.names(), *self._changes]))

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor; its size and place in the file are the base's.

        Raises:
            PresetError: there is no tensor of that name.
        """
        return self._infos[name] if name in self._infos else self.base.info(name)

    def read(self, name: str) -> np.ndarray:
        """The base's tensor, or a new array where the adapter changes it.

        Raises:
            PresetError: there is no tensor of that name, or the source is closed.
        """
        change = self._changes.get(name)
        return self.base.read(name) if change is None else self._merge(name, change)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's file pages."""
        change = self._changes.get(name)
        self.base.release(name if change is None else change.original)

    def close(self) -> None:
        """Close the base and the adapter."""
        self.base.close()
        self.adapter.close()

    # Planning

    def _ours(self, name: str) -> str:
        return name.removeprefix(self._strip)

    def _fail(self, what: str) -> PresetError:
        return PresetError(
            f"{self.adapter.path}: {what}; adapter and base are perhaps of different models: give "
            "the base that the adapter was trained on"
        )

    def _plan(self, module: str, roles: Mapping[str, str]) -> None:
        """The changes that one module's tensors make."""
        config, target = self.adapter.config, self._ours(f"{module}.weight")
        is_head = self._is_tied and module == _HEAD
        original = f"{_EMBEDDING}.weight" if is_head else target
        if "bias" in roles or "base.bias" in roles or "B.bias" in roles:
            self._plan_bias(module, roles)
        steps: dict[str, Any] = {}
        embedding, linear = {"embedding_A", "embedding_B"}, {"A", "B"}
        if factors := roles.keys() & (embedding | linear | {"magnitude"}):
            pair = linear if factors & linear else embedding
            wanted = pair | ({"magnitude"} if config.use_dora else set())
            if factors != wanted or not config.targets(module):
                why = "" if config.targets(module) else ", and target_modules names it not"
                raise self._fail(
                    f"{module} has {', '.join(sorted(factors))}, expected "
                    f"{', '.join(sorted(wanted))}{why}"
                )
            if pair is linear:
                steps |= {"left": (roles["B"], False), "right": (roles["A"], False)}
            else:
                steps["left"] = (roles["embedding_A"], True)
                steps["right"] = (roles["embedding_B"], True)
                steps["by_column"] = config.use_dora
            steps["magnitude"] = roles.get("magnitude")
        if full := {"weight", "base.weight"} & roles.keys():
            # PEFT saves whole embeddings too where they are adapted, or longer than the base's.
            if not (config.saves(module) or module in (_EMBEDDING, _HEAD)) or len(full) > 1:
                raise self._fail(f"{module} is saved whole, and modules_to_save names it not")
            steps["full"] = roles[full.pop()]
        if "tokens" in roles:
            indices = config.trained_tokens(module)
            if indices is None or steps:
                raise self._fail(f"{module} has trained tokens, and other changes or no indices")
            steps["rows"] = (roles["tokens"], indices)
        if steps:
            self._changes[target] = _Change(module, original, **steps)

    def _plan_bias(self, module: str, roles: Mapping[str, str]) -> None:
        config, target = self.adapter.config, self._ours(f"{module}.bias")
        full = roles.get("bias") or roles.get("base.bias")
        if full and config.bias == "none" and not config.saves(module):
            raise self._fail(f"{module} has a bias, and bias is 'none'")
        if "B.bias" in roles and (not config.lora_bias or config.use_dora):
            raise self._fail(f"{module} has a bias of B, without lora_bias or with use_dora")
        self._changes[target] = _Change(module, target, full, addend=roles.get("B.bias"))

    def _untie(self) -> None:
        """Part a tied head from the embedding where only one of them changes.

        PEFT leaves the head as it was where it adapts the embedding, and the other way round.
        Trained tokens are those of both.
        """
        embedding = self._changes.get(f"{_EMBEDDING}.weight")
        head = self._changes.get(f"{_HEAD}.weight")
        if not self._is_tied or (head is None and (embedding is None or embedding.rows)):
            return
        if self.adapter.config.ensure_weight_tying:
            if head is not None:
                raise self._fail("the tied head has tensors of its own with ensure_weight_tying")
            return
        if head is None and embedding is not None:
            # An embedding that is both saved and adapted was saved as it was before.
            before = embedding.full if embedding.left else None
            self._changes[f"{_HEAD}.weight"] = _Change(_HEAD, f"{_EMBEDDING}.weight", before)
        elif head is not None and embedding is not None and self._are_equal(head, embedding):
            del self._changes[f"{_HEAD}.weight"]

    def _are_equal(self, head: _Change, embedding: _Change) -> bool:
        """Whether two whole tensors are one, saved twice."""
        if not head.full or not embedding.full or head.left or embedding.left:
            return False
        return np.array_equal(self.adapter.read(head.full), self.adapter.read(embedding.full))

    def _check_targets(self) -> None:
        """Refuse an adapter of which a part is missing."""
        adapted = {c.module for c in self._changes.values() if c.left is not None}
        for name in self.base.names():
            module = name.removesuffix(".weight") if name.endswith(".weight") else ""
            module = f"{self._strip}{module}" if self._strip and module != _HEAD else module
            if len(self.base.info(name).shape) != 2 or module in adapted or not module:
                continue
            if self.adapter.config.targets(module):
                raise self._fail(f"{module} should be adapted and has no lora_A and lora_B")

    def _check(self, name: str, change: _Change) -> TensorInfo:
        """Refuse tensors that do not fit; what the changed tensor is."""
        if change.original not in self.base.names():
            what = "no bias" if name.endswith(".bias") else f"no {change.original}"
            raise self._fail(f"it has tensors for {change.module}, and the base has {what}")
        info, shape = self.base.info(change.original), self.base.info(change.original).shape
        if change.full is not None:
            full = self.adapter.info(change.full).shape
            # Only a vocabulary may grow.
            if full[1:] != shape[1:] or (
                full != shape and change.module not in (_EMBEDDING, _HEAD)
            ):
                raise self._fail(f"{change.full} has shape {full}, and the base's {shape}")
            shape = full
        expected: dict[str, tuple[int, ...]] = {}
        if change.left is not None and change.right is not None:
            rank = self.adapter.config.rank(change.module)
            for (tensor, is_transposed), wanted in (
                (change.left, (shape[0], rank)),
                (change.right, (rank, shape[1])),
            ):
                expected[tensor] = wanted[::-1] if is_transposed else wanted
        if change.magnitude is not None:
            expected[change.magnitude] = (shape[1 if change.by_column else 0],)
        if change.addend is not None:
            expected[change.addend] = shape
        if change.rows is not None:
            tensor, indices = change.rows
            expected[tensor] = (len(indices), *shape[1:])
            if any(index >= shape[0] for index in indices):
                raise self._fail(f"trainable_token_indices go beyond the {shape[0]} tokens")
        for tensor, wanted in expected.items():
            if (got := self.adapter.info(tensor).shape) != wanted:
                raise self._fail(f"{tensor} has shape {got}, expected {wanted}")
        return replace(info, shape=shape)

    # Merging

    def _merge(self, name: str, change: _Change) -> np.ndarray:
        """The changed tensor, in the base's dtype."""
        info, adapter = self._infos[name], self.adapter
        old = adapter.read(change.full) if change.full else self.base.read(change.original)
        if change.left is None or change.right is None:
            new = old.astype(info.dtype)  # a copy, always
            if change.rows is not None:
                new[list(change.rows[1])] = adapter.read(change.rows[0]).astype(info.dtype)
            if change.addend is not None:
                scale = adapter.config.scale(change.module)
                addend = np.float32(scale) * adapter.read(change.addend)
                new = (old.astype(np.float32) + addend).astype(info.dtype)
            return new
        left, right = (
            adapter.read(tensor).T if is_transposed else adapter.read(tensor)
            for tensor, is_transposed in (change.left, change.right)
        )
        right = right * np.float32(adapter.config.scale(change.module))
        step = max(1, _CHUNK // max(1, old.shape[1]))
        spans = [slice(start, start + step) for start in range(0, old.shape[0], step)]
        new = np.empty(info.shape, info.dtype)
        factor: Any = None
        if change.magnitude is not None:
            factor = adapter.read(change.magnitude)
            if change.by_column:
                sums = sum(
                    np.square(old[span].astype(np.float32) + left[span] @ right).sum(0)
                    for span in spans
                )
                factor = factor / np.sqrt(sums)
        for span in spans:
            block = old[span].astype(np.float32) + left[span] @ right
            if factor is not None and change.by_column:
                block *= factor
            elif factor is not None:
                block *= (factor[span] / np.linalg.norm(block, axis=1))[:, None]
            new[span] = block.astype(info.dtype)
        return new
