"""Chat templates render and tokenize as transformers' `apply_chat_template` does it."""

import os

import pytest

from puna.errors import TemplateError
from tests.parity.chat_templates import CONVERSATIONS, OPTIONS, SPECIAL, TEMPLATES
from tests.tiny_tokenizers import byte_level

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.backend_free


def _reference(tokenizer):
    """transformers' tokenizer over the same vocabulary, special tokens and templates."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend,
        bos_token=tokenizer.start_token,
        eos_token=tokenizer.end_token,
        chat_template=tokenizer.chat_templates,
    )


def _assert_same(tokenizer, reference, **named):
    """Every conversation with all options: the same text and ids, or both refuse."""
    rendered = 0
    for chat_name, messages in CONVERSATIONS.items():
        for option_name, options in OPTIONS.items():
            case = f"{chat_name} {option_name}"
            given = options | named
            try:
                theirs = reference.apply_chat_template(messages, tokenize=False, **given)
            except Exception:
                with pytest.raises(TemplateError):
                    tokenizer.apply_chat_template(messages, **given)
                with pytest.raises(TemplateError):
                    tokenizer.apply_chat_template(messages, tokenize=True, **given)
                continue
            assert tokenizer.apply_chat_template(messages, **given) == theirs, case
            rendered += 1
            if any(token in repr((messages, options)) for token in tokenizer._encoder.added):
                continue  # a special token in a message is one to transformers, and text to us
            ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
            ours = tokenizer.apply_chat_template(messages, tokenize=True, **given).tolist()
            if tokenizer.add_start_token and ids[:1] != [tokenizer.start_token_id]:
                ids = [tokenizer.start_token_id, *ids]
            assert ours == ids, case
    return rendered


@pytest.mark.parametrize("name", TEMPLATES)
def test_kinds_of_templates(name):
    tokenizer = byte_level(chat_template=TEMPLATES[name])
    tokenizer.add_tokens(SPECIAL, special=True)
    assert _assert_same(tokenizer, _reference(tokenizer)) >= 28


@pytest.mark.parametrize("name", ["default", "tool_use", "rag"])
def test_named_templates(name):
    tokenizer = byte_level(chat_template=TEMPLATES["named"])
    tokenizer.add_tokens(SPECIAL, special=True)
    assert _assert_same(tokenizer, _reference(tokenizer), chat_template=name) >= 28


def test_llama3s_own_and_a_full_one_with_its_real_vocabulary(llama3, llama3_tokenizer_dir):
    tokenizer = llama3
    reference = transformers.AutoTokenizer.from_pretrained(str(llama3_tokenizer_dir))
    assert reference.chat_template == tokenizer.chat_template
    assert _assert_same(tokenizer, reference) >= 28
    for name in ("llama3-tools", "macros"):
        assert _assert_same(tokenizer, reference, chat_template=TEMPLATES[name]) >= 28


def test_smollm2s_own_with_its_real_vocabulary(smollm2):
    assert "You are a helpful AI assistant" in smollm2.chat_template
    assert _assert_same(smollm2, _reference(smollm2)) >= 28


def test_there_are_twenty_kinds():
    assert len(TEMPLATES) == 20
