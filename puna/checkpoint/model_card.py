"""Model cards: the `README.md` beside a checkpoint, with front matter as the Hub reads it.

A card of ours carries a mark with a digest of all the rest. What has been changed since, and what
others wrote, has none that fits, and is never written over.

Source: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from puna.quantization.scheme import Scheme
    from puna.text.tokenizer import Tokenizer

CARD = "README.md"
PLACE = "path/to/this/model"  # stands in the examples for where the model is

_MARK = re.compile(r"<!-- puna:card [0-9a-f]{64} [^\n]*-->\n")
_MARK_TEXT = (
    "<!-- puna:card {} Puna renews this file with each save until somebody changes it. -->\n"
)
_MOST = 1 << 16  # bytes of a card that are looked at
_FENCE = "---"
_EMBEDDING = "model.embed_tokens"  # transformers reads it in floats alone

# Who publishes what under which licence, where its own card is not at hand. Nothing is guessed.
_LICENSES: tuple[tuple[str, str], ...] = (
    (r"meta-llama/Llama-2-.+", "llama2"),
    (r"meta-llama/Meta-Llama-3-.+", "llama3"),
    (r"meta-llama/(Meta-)?Llama-3\.1-.+|meta-llama/Llama-Guard-3-8B", "llama3.1"),
    (r"meta-llama/Llama-3\.2-.+|meta-llama/Llama-Guard-3-1B", "llama3.2"),
    (r"meta-llama/Llama-3\.3-.+", "llama3.3"),
    (r"HuggingFaceTB/SmolLM2-.+", "apache-2.0"),
)
# What these licences want to be shown beside a model that was made from theirs.
_NOTICES: Mapping[str, str] = {
    "llama3": "Built with Meta Llama 3.",
    "llama3.1": "Built with Llama.",
    "llama3.2": "Built with Llama.",
    "llama3.3": "Built with Llama.",
}


@dataclass(frozen=True, kw_only=True)
class License:
    """A licence in the words of a card's front matter.

    Args:
        id: as the Hub lists them, such as "apache-2.0" or "llama3.2"; "other" with a name.
        name: what it is called, where the Hub does not list it.
        link: where it can be read.
    """

    id: str
    name: str | None = None
    link: str | None = None


UNKNOWN = License(id="other", name="unknown")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card tells; `render` makes the text.

    What is not known is left out of the text. A model has one as `card`, which `save_to_preset`
    writes; whoever trains it puts in what it was trained on:

    >>> card = ModelCard(base="HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> card = dataclasses.replace(card, data={"pirate.jsonl": 300}, metrics={"loss": 1.25})
    >>> [line for line in card.render().splitlines() if line.startswith("| ")]
    ['| Data | rows |', '| pirate.jsonl | 300 |', '| Measured | |', '| loss | 1.25 |']

    Args:
        base: the Hub's id of the model that this one was made from, such as "org/name".
        adapters: what was merged into it: ids of the Hub, or "" for one that is not there.
        license: the base's licence, which holds for what is made from it.
        title: the headline; None makes one from the base.
        kind: "model", or "adapter" for a LoRA adapter alone.
        is_chat: whether it has a chat template.
        quantization: how the matrices are quantized, such as "int4"; None where they are not.
        opens_in_transformers: False for what transformers cannot read.
        data: the names of the data it was trained on, and how many rows each has, if known.
        hyperparameters: settings of the training, by their names.
        metrics: what was measured, by names such as "first loss" and "validation loss".
        curve: the name of a picture of the losses, in the same directory.
    """

    base: str | None = None
    adapters: tuple[str, ...] = ()
    license: License = UNKNOWN
    title: str | None = None
    kind: Literal["model", "adapter"] = "model"
    is_chat: bool = False
    quantization: str | None = None
    opens_in_transformers: bool = True
    data: Mapping[str, int | None] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: str | None = None

    def of_files(self, tokenizer: Tokenizer | None, schemes: Mapping[str, Scheme]) -> ModelCard:
        """The card with what files tell of the model.

        Args:
            tokenizer: the one that is saved with it.
            schemes: how matrices are quantized, under their names.
        """
        names = Counter(scheme.name for scheme in schemes.values()).most_common(1)
        return dataclasses.replace(
            self,
            is_chat=tokenizer is not None and bool(tokenizer.chat_templates),
            quantization=names[0][0] if names else None,
            opens_in_transformers=_EMBEDDING not in schemes,
        )

    @property
    def is_trained(self) -> bool:
        """Whether anything is told of a training."""
        return bool(self.data or self.hyperparameters or self.metrics or self.curve)

    def render(self) -> str:
        """The whole file; the same card gives the same text."""
        parts = [
            f"# {self._title()}",
            self._introduction(),
            "## How to load it",
            *self._examples(),
            *self._training(),
            "## Licence",
            self._licence(),
        ]
        head = f"{_FENCE}\n{_dumped(self._front_matter())}{_FENCE}\n"
        return _marked(head, "\n" + "\n\n".join(parts) + "\n")

    def _front_matter(self) -> dict[str, Any]:
        is_adapter = self.kind == "adapter"
        relation = "quantized" if self.quantization else "finetune" if self._is_changed() else None
        told = {
            "base_model": self.base,
            "base_model_relation": "adapter" if is_adapter else relation,
            # The libraries that the Hub knows how to load these files with.
            "library_name": "peft" if is_adapter else "transformers",
            "license": self.license.id,
            "license_name": self.license.name,
            "license_link": self.license.link,
            "pipeline_tag": "text-generation",
            "tags": [
                *("puna", "keras", "llama"),
                *(["lora"] if is_adapter else []),
                *(["conversational"] if self.is_chat else []),
            ],
        }
        if self.base is None:
            del told["base_model_relation"]
        return {name: value for name, value in told.items() if value is not None}

    def _is_changed(self) -> bool:
        return self.is_trained or bool(self.adapters)

    def _title(self) -> str:
        if self.title is not None:
            return _plain(self.title)
        name = self.base.rpartition("/")[2] if self.base else "Llama"
        if self.kind == "adapter":
            return f"A LoRA adapter for {name}" if self.base else "A LoRA adapter"
        changes = ["fine-tuned"] if self._is_changed() else []
        return ", ".join([name, *changes, *([self.quantization] if self.quantization else [])])

    def _introduction(self) -> str:
        base = _link(self.base) if self.base else None
        if self.kind == "adapter":
            of = f" for {base}" if base else ""
            return (
                f"A LoRA adapter{of}, made with Puna (Llama in Keras 3). It holds what changes in "
                "the base model, which is loaded with it."
            )
        made = "Fine-tuned and saved" if self.is_trained else "Saved"
        text = f"{made} with Puna (Llama in Keras 3){f', from {base}' if base else ''}"
        if self.adapters:
            named = " and ".join(_link(name) if name else "an adapter" for name in self.adapters)
            text += f", with {named} merged into the weights"
        if self.quantization:
            text += f". Its matrices are quantized to {self.quantization} (compressed-tensors)"
        return text + "."

    def _examples(self) -> list[str]:
        call = 'puna.ChatState(model).send_message("Hello!")'
        call = call if self.is_chat else 'model.generate("Hello", max_new_tokens=50)'
        if self.kind == "adapter" and self.base is None:
            load = (
                f'model = puna.models.CausalLM.from_preset("path/to/its/base", adapter="{PLACE}")'
            )
        else:
            load = f'model = puna.models.CausalLM.from_preset("{PLACE}")'
        found = ["With Puna:", _code("import puna", "", load, call)]
        if self.kind == "adapter":
            return [*found, "With PEFT:", _code(*self._with_peft())]
        if not self.opens_in_transformers:
            return found
        needs = "transformers (and `pip install compressed-tensors`)"
        prompt = '[{"role": "user", "content": "Hello!"}]' if self.is_chat else '"Hello"'
        code = _code(
            "from transformers import pipeline",
            "",
            f'pipe = pipeline("text-generation", "{PLACE}")',
            f"pipe({prompt}, max_new_tokens=50)",
        )
        return [*found, f"With {needs if self.quantization else 'transformers'}:", code]

    def _with_peft(self) -> list[str]:
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{self.base or "path/to/its/base"}")',
            f'model = PeftModel.from_pretrained(base, "{PLACE}")',
        ]

    def _training(self) -> list[str]:
        if not self.is_trained:
            return []
        rows = {name: "unknown" if n is None else f"{n:,}" for name, n in self.data.items()}
        tables = (("Data", "rows", rows), ("Setting", "", self.hyperparameters),
                  ("Measured", "", self.metrics))  # fmt: skip
        found = ["## Training", *(_table(*table) for table in tables if table[2])]
        if self.curve is not None:
            found.append(f"![The losses while it was trained](<{_plain(self.curve)}>)")
        return found

    def _licence(self) -> str:
        base = _link(self.base) if self.base else "the model that this one was made from"
        if self.license == UNKNOWN:
            return f"Not known to Puna: see {base}, whose terms hold for what is made from it."
        name = _plain(self.license.name or self.license.id)
        link = self.license.link
        shown = f"[{name}]({link})" if link and re.fullmatch(r"https?://[^\s()<>]+", link) else name
        notice = _NOTICES.get(self.license.id)
        text = f"{shown}, the licence of {base}."
        return f"{notice} {text}" if notice else text


# Files


def is_ours(text: str) -> bool:
    """Whether a card is one that `render` made, as it made it.

    >>> text = ModelCard().render()
    >>> is_ours(text), is_ours(text.replace("Hello", "Ahoy")), is_ours("# Mine")
    (True, False, False)
    """
    found = _MARK.search(text)
    return found is not None and _marked(text[: found.start()], text[found.end() :]) == text


def is_free(directory: Path) -> bool:
    """Whether a directory's card may be written: there is none, or one of ours."""
    path = directory / CARD
    if not path.exists() and not path.is_symlink():
        return True
    text = read_card(path)
    return text is not None and is_ours(text)


def write_card(work: Path, card: ModelCard, directory: Path) -> None:
    """Write a card where a directory is made that shall take another's place.

    Args:
        work: the new directory.
        card: what to write.
        directory: the other, whose card stays if somebody else wrote it.
    """
    if is_free(directory):
        (work / CARD).write_bytes(card.render().encode())


def read_card(path: Path) -> str | None:
    """The text of a card; None where it is missing, none or far too long."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST:
            return None
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def placed(text: str, repository: str) -> str:
    """A card of ours whose examples load the model from where it is published.

    Args:
        text: the card.
        repository: its id on the Hub.
    """
    found = _MARK.search(text)
    assert found is not None
    text = text[: found.start()] + "\0" + text[found.end() :]
    for call in ("from_preset(", "adapter="):
        text = text.replace(f'{call}"{PLACE}"', f'{call}"hf://{repository}"')
    head, _, body = text.replace(f'"{PLACE}"', f'"{repository}"').partition("\0")
    return _marked(head, body)


def card_from_base(base: str | None, files: Path | None, adapters: tuple[str, ...]) -> ModelCard:
    """What a base model tells of what is made from it.

    Args:
        base: its id on the Hub, if it has one.
        files: its directory, or a file in it, whose card may name its licence and its own base.
        adapters: as in `ModelCard`.
    """
    directory = files if files is None or files.is_dir() else files.parent
    text = None if directory is None else read_card(directory / CARD)
    told = front_matter(text or "")
    if base is None:
        named = told.get("base_model")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        base = named if isinstance(named, str) and _is_id(named) else None
    return ModelCard(base=base, adapters=adapters, license=_license(told, base))


def front_matter(text: str) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there are none that can be read."""
    import yaml

    lines = text.splitlines()
    if not lines or lines[0].strip() != _FENCE or _FENCE not in lines[1:]:
        return {}
    try:
        told = yaml.safe_load("\n".join(lines[1 : lines.index(_FENCE, 1)]))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _license(told: Mapping[str, Any], base: str | None) -> License:
    """The licence that a base's card names; else the one that its publisher is known for."""
    id_, name, link = (
        word if isinstance(word, str) and word.isprintable() and len(word) < 300 else None
        for word in map(told.get, ("license", "license_name", "license_link"))
    )
    if id_:
        return License(id=id_, name=name, link=link)
    known = (word for pattern, word in _LICENSES if base and re.fullmatch(pattern, base))
    return next((License(id=word) for word in known), UNKNOWN)


def _marked(head: str, body: str) -> str:
    digest = hashlib.sha256(f"{head}{body}".encode()).hexdigest()
    return head + _MARK_TEXT.format(digest) + body


# Markdown


def _dumped(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000)


def _is_id(text: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def _link(repository: str) -> str:
    return f"[{repository}](https://huggingface.co/{repository})"


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(name: str, value: str, rows: Mapping[str, Any]) -> str:
    head = [f"| {name} | {value} |".replace("|  |", "| |"), "|---|---|"]
    return "\n".join([*head, *(f"| {_plain(k)} | {_plain(_shown(v))} |" for k, v in rows.items())])


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: Any) -> str:
    """A text that Markdown takes as it is, in one line."""
    line = " ".join(str(text).encode(errors="replace").decode().split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)
