"""Text to ids, with special tokens parsed, as plain characters, or where a template put them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property

import tokenizers

from puna.errors import TokenizerError


class Encoder:
    """The encoding half of a tokenizer.

    Plain text is encoded by a second Rust tokenizer that shares the vocabulary (it is not copied)
    and has no added tokens at all, special or not. That is exact, needs no switch on the first
    one, and so holds from several threads at once.

    Args:
        backend: the Rust tokenizer.
        special_ids: ids that may not come out of plain text.

    Attributes:
        added: the added tokens, special or not, by their text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: Iterable[int | None]):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.added = {token.content: token for token in added.values()}
        self._ids = {token.content: token_id for token_id, token in added.items()}
        unknown = getattr(backend.model, "unk_token", None)
        unknown_id = None if unknown is None else backend.token_to_id(unknown)
        self._forbidden = frozenset(special_ids) - {unknown_id}

    def parse(self, texts: Sequence[str], start_id: int | None = None) -> list[list[int]]:
        """Ids of texts in which added tokens are recognised; `start_id` goes before each, once."""
        # with a start token the post-processor may add more, such as an end token
        rows = _encode(self._backend, texts, add_special_tokens=start_id is not None)
        return [row[1:] if start_id is not None and row[1:2] == [start_id] else row for row in rows]

    def plain(self, texts: Sequence[str], start_id: int | None = None) -> list[list[int]]:
        """Ids of texts in which nothing is special; `start_id` goes before each."""
        rows = self._plain(texts, self._first)
        return rows if start_id is None else [[start_id, *row] for row in rows]

    def segments(self, segments: Iterable[tuple[str, bool]]) -> list[list[int]]:
        """Ids of each of (text, is an added token) pairs, texts as plain characters."""
        runs = list(segments)
        ids: list[list[int]] = []
        for place, (text, is_token) in enumerate(runs):
            if is_token:
                ids.append([self._ids[text]])
                continue
            before, after = self._token(runs, place - 1), self._token(runs, place + 1)
            text = text.lstrip() if before is not None and before.rstrip else text
            text = text.rstrip() if after is not None and after.lstrip else text
            backend = self._continued if place else self._first
            ids.append(self._plain([text], backend)[0] if text else [])
        return ids

    def _token(self, runs: list[tuple[str, bool]], place: int) -> tokenizers.AddedToken | None:
        """The added token at a place, where there is one."""
        if not 0 <= place < len(runs) or not runs[place][1]:
            return None
        return self.added[runs[place][0]]

    def _plain(self, texts: Sequence[str], backend: tokenizers.Tokenizer) -> list[list[int]]:
        rows = _encode(backend, texts)
        for place, text in enumerate(texts):
            if not self._forbidden.isdisjoint(rows[place]):
                rows[place] = self._by_character(text)
        return rows

    def _by_character(self, text: str) -> list[int]:
        """Ids of a text whose merges make a special token: of its characters, one by one."""
        ids = [i for row in _encode(self._continued, list(text)) for i in row]
        bad = sorted(token for token, i in self._ids.items() if i in self._forbidden and i in ids)
        if bad:
            raise TokenizerError(
                f"The text contains {bad!r}, which this vocabulary cannot write otherwise than as "
                "a special token. Remove it from the text, or allow it with parse_special=True."
            )
        return ids

    @cached_property
    def _first(self) -> tokenizers.Tokenizer:
        """The tokenizer without added tokens."""
        plain = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            plain.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            plain.pre_tokenizer = self._backend.pre_tokenizer
        return plain

    @cached_property
    def _continued(self) -> tokenizers.Tokenizer:
        """The same for text after a special token, where some add no space before the text."""
        if self._backend.pre_tokenizer is None:
            return self._first
        state = self._backend.pre_tokenizer.__getstate__()
        continued = state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"')
        if continued == state:
            return self._first
        pre_tokenizer = copy.deepcopy(self._backend.pre_tokenizer)
        pre_tokenizer.__setstate__(continued)
        plain = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            plain.normalizer = self._backend.normalizer
        plain.pre_tokenizer = pre_tokenizer
        return plain


def _encode(
    backend: tokenizers.Tokenizer, texts: Sequence[str], add_special_tokens: bool = False
) -> list[list[int]]:
    try:
        if len(texts) == 1:  # the batch call starts threads
            return [backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        batch = list(texts)
        found = backend.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]
    except (UnicodeEncodeError, TypeError) as error:
        raise TokenizerError(
            f"The text is not valid Unicode, perhaps half a surrogate pair ({error}). Clean it: "
            'text.encode("utf-8", "replace").decode().'
        ) from error
    except BaseException as error:
        if not is_failure(error):
            raise
        raise TokenizerError(
            f"The tokenizers library fails on a text ({' '.join(str(error).split())[:300]}). The "
            "tokenizer's files are broken: download them again."
        ) from error


def is_failure(error: BaseException) -> bool:
    """Whether it is an error, not an interrupt: a panic of Rust code is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
