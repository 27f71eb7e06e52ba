"""Tokenizers: training, saving, loading, and the mask of learnt tokens in a conversation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from burnish.config import UserError
from burnish.store.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    chat_ids,
    load_tokenizer,
    pad_id,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = ["The quick brown fox jumps over the lazy dog, 1234567890 times.", "user assistant system\nhello there"] * 9
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Qwen3's: only the last reply is given an (empty) thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the fox "},
    {"role": "user", "content": "und dann? 🦊"},
    {"role": "assistant", "content": "größer 🦊!"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    special = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    return train_tokenizer(TEXTS, 400, special, CHATML)


def learnt(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[str]:
    """Text of each learnt run."""
    ids, mask = chat_ids(tokenizer, messages)
    assert len(ids) == len(mask)
    groups: list[list[int]] = [[]]
    for token, keep in zip(ids, mask, strict=True):
        if keep:
            groups[-1].append(token)
        elif groups[-1]:
            groups.append([])
    return [tokenizer.decode(group) for group in groups if group]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token
    )
    copy.chat_template = template
    return copy


@pytest.mark.parametrize("text", ["plain", "  two  spaces ", "größe 漢字 🦊 \t\r\n", "1 + 22 = 23", "", "é e\u0301"])
def test_trained_is_lossless(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_trained_splits_digits_and_adds_no_space(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer("123")["input_ids"]] == ["1", "2", "3"]
    assert tokenizer("fox")["input_ids"] != tokenizer(" fox")["input_ids"]
    assert set(tokenizer("hello")) == {"input_ids", "attention_mask"}


def test_trained_special_tokens_come_first_and_are_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert tokenizer("<|user|>")["input_ids"] == [3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) <= 400


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(iter(TEXTS), 400).get_vocab() == tokenizer.get_vocab()


def test_training_refuses_a_vocabulary_without_room_for_bytes() -> None:
    with pytest.raises(UserError, match="at least 261"):
        train_tokenizer(TEXTS, 260)


def test_saved_tokenizer_loads_here_and_in_transformers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.chat_template == CHAT_TEMPLATE
        assert (loaded.pad_token, loaded.eos_token) == ("<|pad|>", "<|end|>")
        assert loaded.all_special_ids == tokenizer.all_special_ids
        ours = tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
        assert loaded.apply_chat_template(TALK, return_dict=True)["input_ids"] == ours


def test_loading_keeps_the_tokenizer_class_for_the_next_save(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "fox"]
    original = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    original.save_pretrained(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert loaded("hello fox")["input_ids"] == original("hello fox")["input_ids"] == [2, 5, 6, 3]
    save_tokenizer(loaded, tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert type(again) is BertTokenizer
    assert again("hello", "fox")["token_type_ids"] == original("hello", "fox")["token_type_ids"]


def test_loading_without_tokenizer_json_falls_back(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert not loaded.is_fast
    assert loaded("hi")["input_ids"] == ByT5Tokenizer()("hi")["input_ids"]


def test_loading_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer") as empty:
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(UserError, match="cannot be read") as broken:
        load_tokenizer(tmp_path)
    assert all("\n" not in str(error.value) for error in (empty, broken))


def test_pad_id_falls_back() -> None:
    plain = train_tokenizer(TEXTS, 300)
    assert pad_id(plain) == 0
    plain.pad_token = None
    assert pad_id(plain) == plain.eos_token_id == 1
    plain.eos_token = None
    assert pad_id(plain) == 0


def test_marked_template_learns_replies_and_their_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = chat_ids(tokenizer, TALK)
    assert ids == tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert learnt(tokenizer, TALK) == ["the fox <|end|>", "größer 🦊!<|end|>"]
    assert mask[-1] and ids[-1] == tokenizer.eos_token_id


def test_unmarked_template_learns_the_same(chatml: PreTrainedTokenizerFast) -> None:
    ids, mask = chat_ids(chatml, TALK)
    assert ids == chatml.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert learnt(chatml, TALK) == ["the fox <|im_end|>", "größer 🦊!<|im_end|>"]
    assert not mask[-1], "the line break after the end of the turn is not learnt"


def test_marked_and_unmarked_masks_agree_token_by_token(chatml: PreTrainedTokenizerFast) -> None:
    marked = with_template(
        chatml,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    assert chat_ids(marked, TALK) == chat_ids(chatml, TALK)


def test_end_of_turn_outside_the_markers_is_learnt(chatml: PreTrainedTokenizerFast) -> None:
    outside = with_template(
        chatml,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}",
    )
    assert chat_ids(outside, TALK) == chat_ids(chatml, TALK)


def test_template_whose_last_reply_differs(chatml: PreTrainedTokenizerFast) -> None:
    thinking = with_template(chatml, THINKING)
    assert learnt(thinking, TALK) == ["the fox <|im_end|>", "<think>\n\n</think>\n\ngrößer 🦊!<|im_end|>"]


def test_template_without_an_end_of_turn_gets_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = with_template(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert learnt(bare, TALK[:3]) == ["assistant: the fox \n<|end|>"]


def test_template_that_closes_the_whole_conversation_too(chatml: PreTrainedTokenizerFast) -> None:
    closing = with_template(
        chatml,  # as Phi-4-mini's: an end token follows the last end of turn
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
    )
    closing.eos_token = "<|endoftext|>"
    assert learnt(closing, TALK) == ["the fox <|im_end|>", "größer 🦊!<|im_end|><|endoftext|>"]
    assert learnt(closing, TALK[:4]) == ["the fox <|im_end|>"]


def test_a_conversation_that_ends_with_the_user_learns_earlier_replies(chatml: PreTrainedTokenizerFast) -> None:
    assert learnt(chatml, TALK[:4]) == ["the fox <|im_end|>"]


def test_template_that_rewrites_history_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    counting = with_template(chatml, "{{ messages | length }}" + CHATML)
    with pytest.raises(UserError, match="reply in message 3 .*generation"):
        chat_ids(counting, TALK)


def test_template_errors_and_absence(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="rejects this conversation: roles are system, user and assistant, not tool"):
        chat_ids(tokenizer, [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}])
    with pytest.raises(UserError, match="no chat template"):
        chat_ids(with_template(tokenizer, ""), TALK)


def test_slow_tokenizer_masks_by_segment() -> None:
    slow = ByT5Tokenizer()
    slow.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids, mask = chat_ids(slow, TALK[1:3])
    assert ids == slow("user:hello</s>assistant:the fox </s>", add_special_tokens=False)["input_ids"]
    assert [i for i, keep in zip(ids, mask, strict=True) if keep] == slow("the fox")["input_ids"]
