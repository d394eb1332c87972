"""Text to token ids and back: keras-hub's interface over the Rust `tokenizers` library."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import processors

from puna.errors import TokenizerError
from puna.text.added_tokens import list_in_config, new_tokens
from puna.text.chat_tokens import ChatTokens
from puna.text.encoder import Encoder
from puna.text.gguf_tokenizer import settings_from_gguf
from puna.text.hf_files import settings_from_directory, write_directory
from puna.text.inputs import as_ids, as_texts
from puna.text.streaming import (
    ByteFallbackStream,
    ByteLevelStream,
    Decoding,
    StreamDecoder,
    WindowStream,
)
from puna.text.tiktoken import BEGIN_OF_TEXT, LLAMA3_STOP_TOKENS, start_token_processor


class Tokenizer(ChatTokens):
    """A tokenizer with keras-hub's interface.

    Calling it gives ids without a start token, as in keras-hub; `add_special_tokens=True`, the
    preprocessor and chat templates add it, once. A tokenizer may be used from several threads.

    Args:
        backend: the Rust tokenizer. Its truncation and padding are switched off.
        start_token: text of the token that begins a text (BOS), or None.
        end_token: text of the token that ends one (EOS), or None.
        pad_token: text of the token that fills up batches; without one, id 0 is used. Padding is
            known by its mask, never by its id.
        stop_token_ids: ids that end generation, beside the end token's.
        add_start_token: whether texts begin with the start token; None means as the backend's
            post-processor has it.
        chat_template: the Jinja chat template, or several by name.
        config: the contents of `tokenizer_config.json`, kept for `save`.

    Raises:
        TokenizerError: a named token or id is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        start_token: str | None = None,
        end_token: str | None = None,
        pad_token: str | None = None,
        stop_token_ids: Iterable[int] = (),
        add_start_token: bool | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.start_token = start_token
        self.end_token = end_token
        self.pad_token = pad_token
        self.start_token_id = self._id_or_none(start_token)
        self.end_token_id = self._id_or_none(end_token)
        self.pad_token_id = 0 if pad_token is None else self.token_to_id(pad_token)
        self.stop_token_ids = self._all_stops(stop_token_ids)
        self.config = dict(config or {})
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self.chat_templates: dict[str, str] = dict(named or {})
        self._set_start(add_start_token)
        self._decoding = Decoding(backend)
        self._read_added_tokens()

    # Where a tokenizer comes from and goes to

    @classmethod
    def from_directory(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a tokenizer from a Hugging Face directory, or from Meta's `tokenizer.model`.

        Args:
            path: the directory. `tokenizer.json` is read with `tokenizer_config.json`,
                `chat_template.jinja`, `generation_config.json` and `config.json` where there.
            overrides: constructor arguments that win over the files.

        Raises:
            TokenizerError: there is no tokenizer, or its files are broken or do not agree.
        """
        return cls(**{**settings_from_directory(Path(path)), **overrides})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], **overrides: Any) -> Self:
        """Read a tokenizer from a GGUF file's metadata, with its own split rule and template.

        Args:
            metadata: the file's key-value pairs as plain Python values.
            overrides: constructor arguments that win over the file.

        Raises:
            TokenizerError: keys are missing, or `tokenizer.ggml.pre` is not known.
        """
        return cls(**{**settings_from_gguf(metadata), **overrides})

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and the chat templates.

        The same tokenizer always writes the same bytes, and transformers opens them with the same
        ids, start token and template.
        """
        config = {k: v for k, v in self.config.items() if k != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        config |= {"bos_token": self.start_token, "eos_token": self.end_token}
        if self.pad_token is not None:
            config["pad_token"] = self.pad_token
        if "add_bos_token" in config:
            config["add_bos_token"] = self.add_start_token
        backend_json = self._backend.to_str(pretty=True)
        write_directory(Path(directory), backend_json, config, self.chat_templates)

    def get_config(self) -> dict[str, Any]:
        """The whole tokenizer as JSON values, vocabulary included (megabytes)."""
        return {
            "backend": self._backend.to_str(),
            "start_token": self.start_token,
            "end_token": self.end_token,
            "pad_token": self.pad_token,
            "stop_token_ids": list(self.stop_token_ids),
            "add_start_token": self.add_start_token,
            "chat_template": dict(self.chat_templates),
            "config": copy.deepcopy(self.config),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The tokenizer that `get_config` describes."""
        backend = tokenizers.Tokenizer.from_str(config["backend"])
        return cls(**{**config, "backend": backend})

    # Text to ids

    def __call__(self, text: Any, **options: Any) -> Any:
        """See `tokenize`."""
        return self.tokenize(text, **options)

    def tokenize(
        self, text: Any, *, parse_special: bool = True, add_special_tokens: bool = False
    ) -> Any:
        """Turn text into token ids.

        Args:
            text: a string, or a list or array of strings; UTF-8 bytes count as strings.
            parse_special: whether the text of an added token, such as "<|eot_id|>", becomes that
                token. Say False for text from people you do not trust: then all of it is plain
                characters and no special token can come out.
            add_special_tokens: whether to put the start token before it, where this tokenizer
                does and the text does not begin with it already.

        Returns:
            A 1-D int32 array for one string, a list of such arrays for several.

        Raises:
            TokenizerError: `text` is not text, or not valid Unicode.
        """
        texts, batched = as_texts(text)
        encode = self._encoder.parse if parse_special else self._encoder.plain
        start = self.start_token_id if add_special_tokens and self.add_start_token else None
        rows = [np.asarray(ids, dtype=np.int32) for ids in encode(texts, start)]
        return rows if batched else rows[0]

    def count_tokens(self, text: str, *, parse_special: bool = True) -> int:
        """How many tokens a string has, without a start token."""
        return len(self.tokenize(text, parse_special=parse_special))

    def pieces(self, text: str, *, parse_special: bool = True) -> list[str]:
        r"""The text of each token of a string; a part of a character shows as `\xf0\x9f`."""
        ids = self.tokenize(text, parse_special=parse_special).tolist()
        return [self.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Turn a rendered chat into ids: trusted special tokens as such, the rest as plain text.

        Text between two special tokens is tokenized as one, whichever parts it came from, so the
        ids are those of the whole text wherever no untrusted part spells a special token.

        Args:
            segments: (text, is a special token), as `ChatTemplate.segments` gives.

        Returns:
            A 1-D int32 array.
        """
        pieces = self.encode_pieces(segments)
        return np.asarray([token_id for piece in pieces for token_id in piece], dtype=np.int32)

    # Ids to text

    def detokenize(self, ids: Any, *, skip_special_tokens: bool = False) -> Any:
        """Turn token ids into text.

        Args:
            ids: integers, 1-D for one text or 2-D or nested lists (of any lengths) for several.
                Ids beyond the vocabulary, which padded embeddings have, give no text.
            skip_special_tokens: whether to leave special tokens out.

        Returns:
            A string, or a list of strings.

        Raises:
            TokenizerError: `ids` are not integers, or negative.
        """
        rows, batched = as_ids(ids)
        texts = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        return texts if batched else texts[0]

    def stream_decoder(
        self, *, skip_special_tokens: bool = False, keep: Collection[str] = ()
    ) -> StreamDecoder:
        """A decoder that takes one id at a time and gives whole characters as they complete.

        The pieces of `push` and the last of `flush` joined are `detokenize` of all the ids.

        Args:
            skip_special_tokens: whether to leave special tokens out.
            keep: texts of special tokens that are not left out nevertheless; those that the
                vocabulary lacks do not matter.

        Example:
            decoder = tokenizer.stream_decoder()
            for token_id in ids:
                print(decoder.push(token_id), end="")
            print(decoder.flush())
        """
        skip = frozenset(self.special_token_ids if skip_special_tokens else ())
        skip -= {self._backend.token_to_id(token) for token in keep}
        if self._decoding.kind == "byte_level":
            return ByteLevelStream(self._backend.id_to_token, skip)
        if self._decoding.kind == "byte_fallback":
            return ByteFallbackStream(self._decoding, self._backend.id_to_token, skip)
        return WindowStream(
            lambda ids: self._backend.decode(
                [token_id for token_id in ids if token_id not in skip], skip_special_tokens=False
            )
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds in the middle of a text, perhaps a part of a character."""
        return self._decoding.token_bytes(self.id_to_token(token_id))

    # The vocabulary

    def token_to_id(self, token: str) -> int:
        """The id of a token, named as the vocabulary writes it.

        Raises:
            TokenizerError: the vocabulary has no such token.
        """
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"The vocabulary of {self.vocabulary_size()} tokens has no {token!r}. Tokens are "
                "named as the vocabulary writes them (a leading space is 'Ġ' or '▁'); for the ids "
                "of a text call the tokenizer."
            )
        return token_id

    def id_to_token(self, token_id: int) -> str:
        """The token with this id, as the vocabulary writes it.

        Raises:
            TokenizerError: the id is negative, too large or unused.
        """
        token = self._backend.id_to_token(int(token_id)) if token_id >= 0 else None
        if token is None:
            raise TokenizerError(
                f"No token has the id {token_id}; ids go from 0 to {self.vocabulary_size() - 1}."
            )
        return token

    def add_tokens(self, tokens: str | Iterable[str], *, special: bool = False) -> int:
        """Add tokens after the largest id; the model needs rows for them (`model.add_tokens`).

        Args:
            tokens: their texts. A text that contains one, anywhere, is split there. Those that
                the vocabulary has already are left as they are.
            special: whether they are control tokens, which decoding may leave out and which no
                plain text makes. Start, end and stop tokens stay what they are.

        Returns:
            How many were new.

        Raises:
            TokenizerError: a token is empty or no text, or ids of the vocabulary are unused, so
                that no id can be given; nothing is added then.
        """
        wanted = [tokens] if isinstance(tokens, str) else list(tokens)
        new = new_tokens(self._backend, wanted, self.vocabulary_size(), special)
        if new:
            self._backend.add_tokens(list(new.values()))
            list_in_config(self.config, new)
            self._read_added_tokens()
        return len(new)

    def vocabulary_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocabulary_size

    @cached_property
    def _vocabulary_size(self) -> int:
        size = self._backend.get_vocab_size()
        if self._backend.id_to_token(size - 1) is not None and not self._backend.id_to_token(size):
            return size
        return max(self._backend.get_vocab().values()) + 1

    # Construction

    def _read_added_tokens(self) -> None:
        """Make what depends on the backend's added tokens, which may have changed."""
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = sorted(i for i, token in added.items() if token.special)
        named_ids = {self.start_token_id, self.end_token_id, *self.stop_token_ids} - {None}
        self._encoder = Encoder(self._backend, named_ids | set(self.special_token_ids))
        self.__dict__.pop("_vocabulary_size", None)

    def _id_or_none(self, token: str | None) -> int | None:
        return None if token is None else self.token_to_id(token)

    def _all_stops(self, given: Iterable[int]) -> tuple[int, ...]:
        """Every id at which generation ends: those given, the end token's, Llama 3's turn ends."""
        stops = {int(stop) for stop in given} | {self.end_token_id}
        if self.start_token == BEGIN_OF_TEXT:
            stops |= {self._backend.token_to_id(token) for token in LLAMA3_STOP_TOKENS}
        ids = tuple(sorted(stop for stop in stops if stop is not None))
        for stop in ids:
            self.id_to_token(stop)
        return ids

    def _set_start(self, wanted: bool | None) -> None:
        """Make the backend put the start token before texts, or not, as wanted."""
        ids = self._backend.encode("").ids
        does = self.start_token_id is not None and ids[:1] == [self.start_token_id]
        wanted = does if wanted is None else wanted
        self.add_start_token = wanted and self.start_token_id is not None
        if self.add_start_token and not does and self.start_token_id is not None:
            processor = start_token_processor(str(self.start_token), self.start_token_id)
            self._backend.post_processor = processor
        elif does and not self.add_start_token:
            self._backend.post_processor = processors.TemplateProcessing(
                single="$A:0", pair="$A:0 $B:1", special_tokens=[]
            )
