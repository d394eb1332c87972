"""A tokenizer's files in a Hugging Face directory: reading and writing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from puna.errors import TokenizerError
from puna.text.encoder import is_failure
from puna.text.keras_hub_tokenizer import ASSETS, settings_from_keras_hub
from puna.text.tiktoken import BEGIN_OF_TEXT, END_OF_TEXT, backend_from_tiktoken, is_tiktoken_file

# Meta's download has it in the model's directory or, in Hugging Face's mirrors, in original/
_TIKTOKEN_PLACES = ("tokenizer.model", "original/tokenizer.model")


def settings_from_directory(path: Path) -> dict[str, Any]:
    """`Tokenizer`'s constructor arguments from the files of a directory.

    Args:
        path: a keras-hub preset; or a directory with `tokenizer.json`, or with Meta's
            `tokenizer.model`, where the files beside it (`tokenizer_config.json`,
            `special_tokens_map.json`, `chat_template.jinja`, `additional_chat_templates/`,
            `generation_config.json`, `config.json`) are optional.

    Returns:
        The arguments by name, the Rust tokenizer as `backend` among them.

    Raises:
        TokenizerError: there is no tokenizer, or a file is broken.
    """
    if not path.is_dir():
        raise TokenizerError(f"{path} is not a directory. Give the directory of a checkpoint.")
    if (path / ASSETS).is_dir():
        return settings_from_keras_hub(path)
    config = _read_json(path / "tokenizer_config.json")
    model = _read_json(path / "config.json")
    generation = _read_json(path / "generation_config.json")
    if (path / "tokenizer.json").is_file():
        backend = _read_backend(path / "tokenizer.json")
        _add_missing_tokens(backend, config.get("added_tokens_decoder", {}), path)
    else:
        backend = backend_from_tiktoken(_find_tiktoken(path))
        config = {"clean_up_tokenization_spaces": False} | config
        config = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT} | config

    special = _read_json(path / "special_tokens_map.json")
    stops = [*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]

    def token(name: str) -> str | None:
        found = _content(config.get(name)) or _content(special.get(name))
        if found is not None and not (isinstance(found, str) and _is_unicode(found)):
            raise TokenizerError(
                f"{path} says that its {name} is {found!r:.80}; expected a text. Correct "
                "tokenizer_config.json or special_tokens_map.json, or download both again."
            )
        ids = _ids(model.get(f"{name}_id")) or _ids(generation.get(f"{name}_id"))
        return found or (backend.id_to_token(ids[0]) if ids else None)

    add_start = config.get("add_bos_token")
    return {
        "backend": backend,
        "start_token": token("bos_token"),
        "end_token": token("eos_token"),
        "pad_token": token("pad_token"),
        "stop_token_ids": [stop for stop in stops if backend.id_to_token(stop) is not None],
        "add_start_token": add_start if isinstance(add_start, bool) else None,
        "chat_template": _read_templates(path, config),
        "config": config,
    }


def write_directory(
    path: Path, backend_json: str, config: dict[str, Any], templates: dict[str, str]
) -> None:
    """Write a tokenizer's files; the same arguments give the same bytes."""
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    _write(path / "tokenizer.json", backend_json)
    _write(path / "tokenizer_config.json", text)
    # a template that another tokenizer left here would win over our config's having none
    (path / "chat_template.jinja").unlink(missing_ok=True)
    for name, template in templates.items():
        if name == "default":
            _write(path / "chat_template.jinja", template)
        else:
            (path / "additional_chat_templates").mkdir(exist_ok=True)
            _write(path / "additional_chat_templates" / f"{name}.jinja", template)


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        _check_charsmaps(path)
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_padding()  # the file's own may be to any length
        backend.no_truncation()
        backend.encode("a")  # some parts fail only when they are used
        return backend
    except BaseException as error:
        if not is_failure(error):
            raise
        reason = " ".join(str(error).split())[:500]
        raise TokenizerError(
            f"{path} cannot be read by the tokenizers library {tokenizers.__version__}: {reason}. "
            "Download the file again, or upgrade the library if the file is newer."
        ) from error


def _check_charsmaps(path: Path) -> None:
    """Refuse a normalizer's table that says it is longer than it is.

    The library takes the memory that the table asks for, and the process dies where it is not
    there.
    """
    text = path.read_bytes()
    if b"precompiled_charsmap" not in text:
        return
    for encoded in _values(json.loads(text), "precompiled_charsmap"):
        table = base64.b64decode(encoded)
        said = 4 + int.from_bytes(table[:4], "little")
        if said > len(table):
            raise ValueError(f"a precompiled_charsmap has {len(table)} bytes of {said}")


def _values(tree: Any, key: str) -> Iterator[Any]:
    """What stands under a key, anywhere in a JSON value."""
    if isinstance(tree, dict):
        if tree.get(key):
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _values(branch, key)


def _find_tiktoken(path: Path) -> Path:
    """Meta's tokenizer file in a directory that has no `tokenizer.json`."""
    for place in _TIKTOKEN_PLACES:
        file = path / place
        if file.is_file():
            if is_tiktoken_file(file):
                return file
            raise TokenizerError(
                f"{file} is a SentencePiece model, and {path} has no tokenizer.json. Make one "
                "once with transformers: "
                f'AutoTokenizer.from_pretrained("{path}").save_pretrained("{path}").'
            )
    raise TokenizerError(
        f"{path} has neither tokenizer.json nor Meta's tokenizer.model. Copy the model's "
        "tokenizer.json there, or give the directory that holds it."
    )


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, decoder: dict[str, dict[str, Any]], path: Path
) -> None:
    """Add the tokens that only `tokenizer_config.json` lists, as transformers does."""
    known = backend.get_added_tokens_decoder()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed: dict[int, AddedToken] = {}
    try:
        for key, fields in decoder.items():
            given = {flag: fields[flag] for flag in flags if flag in fields}
            listed[int(key)] = AddedToken(fields["content"], **given)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise TokenizerError(
            f"{path / 'tokenizer_config.json'} has a malformed added_tokens_decoder "
            f"({type(error).__name__}: {error!s:.200}). Download it again."
        ) from error
    for token_id, token in sorted(listed.items(), key=lambda item: item[0]):
        if token_id in known and known[token_id].content == token.content:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise TokenizerError(
                f"{path / 'tokenizer_config.json'} gives {token.content!r} the id {token_id}, but "
                f"tokenizer.json gives it {backend.token_to_id(token.content)}. The two files are "
                "not of one model: download both again."
            )


def _read_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name; files win over the config."""
    inline = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(inline, str):
        templates = {"default": inline}
    elif isinstance(inline, dict):
        templates = dict(inline)
    elif isinstance(inline, list):
        for entry in inline:
            named = entry if isinstance(entry, dict) else {}
            templates[str(named.get("name"))] = named.get("template", "")
    if not all(isinstance(template, str) for template in templates.values()) or None in templates:
        raise TokenizerError(
            f"{path / 'tokenizer_config.json'} has a chat_template that is no text. Download it "
            "again."
        )
    if (path / "chat_template.jinja").is_file():
        templates["default"] = _read_text(path / "chat_template.jinja")
    for file in sorted(path.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = _read_text(file)
    return templates


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is not UTF-8 text: {error}. Download it again.") from error


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which JSON can say and the library not take."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _content(token: Any) -> Any:
    """A token's text where a config gives it plainly or as a serialized `AddedToken`."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: Any) -> list[int]:
    """One id, several or none, as a list; transformers writes -1 for "none" at times."""
    ids = value if isinstance(value, list) else [value]
    return [token_id for token_id in ids if isinstance(token_id, int) and 0 <= token_id < 2**31]
