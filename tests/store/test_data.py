"""Examples: each row format with its mask token by token, truncation, classes, and errors that name the row."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from burnish.config import UserError
from burnish.store.data import (
    Example,
    Row,
    encode_classification,
    encode_prompt,
    encode_rows,
)
from burnish.store.tokenizer import train_tokenizer

TEXTS = ["What is the capital of Anland? Berga is its capital, grün und schön. 12 + 30 = 42."] * 5
ROWS: list[Row] = [
    {"prompt": "What is 12 + 30?", "completion": " 42"},
    {"prompt": "Grün und schön: 漢字?", "completion": " 🦊"},
]
TALK = [{"role": "user", "content": "capital?"}, {"role": "assistant", "content": "Berga"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    """No chat template."""
    return train_tokenizer(TEXTS, 400, chat_template=None)


@pytest.fixture(scope="module")
def bert() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "rains", "is", "wet", "dry"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space in front of every text, a first token put first."""
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "\n", "▁", "a", "b", ":", "▁a", "▁b"])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def learnt(example: Example) -> list[int]:
    assert len(example.ids) == len(example.labels)
    assert all(label in (-100, token) for token, label in zip(example.ids, example.labels, strict=True))
    return [label for label in example.labels if label != -100]


def test_columns_are_mapped(plain: PreTrainedTokenizerFast) -> None:
    rows = [{"question": "12?", "answer": "42", "text": "ignored"}]
    columns = {"prompt": "question", "completion": "answer"}
    mapped = encode_rows(rows, plain, 64, columns=columns)[0]
    direct = encode_rows([{"prompt": "12?", "completion": "42"}], plain, 64)[0]
    assert (mapped.ids, mapped.labels) == (direct.ids, direct.labels)
    assert mapped.fields == rows[0]


def test_a_row_without_its_cell_is_named(plain: PreTrainedTokenizerFast) -> None:
    rows = [*ROWS, {"prompt": "x", "completion": None}]
    with pytest.raises(UserError, match="data: row 3: no 'completion'; it has prompt"):
        encode_rows(rows, plain, 64)
    with pytest.raises(UserError, match="row 1: 'text' must be text, not a list"):
        encode_rows([{"text": ["x"]}], plain, 64)


def test_prompt_completion_mask_token_by_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for row, example in zip(ROWS, encode_rows(ROWS, tokenizer, 64), strict=True):
        prompt, reply = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        assert example.ids == [*prompt, *reply, tokenizer.eos_token_id]
        assert example.labels == [-100] * len(prompt) + [*reply, tokenizer.eos_token_id]
        assert example.fields == row


def test_boundary_is_that_of_generation(plain: PreTrainedTokenizerFast) -> None:
    example = encode_rows([{"prompt": "Wh", "completion": "at"}], plain, 64)[0]
    assert len(plain("What")["input_ids"]) < len(example.ids) - 1
    assert example.ids[: example.labels.count(-100)] == encode_prompt(plain, "Wh").ids


def test_train_on_all(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_rows(ROWS, tokenizer, 64, train_on="all")[0]
    assert example.labels == example.ids
    only_asked = encode_rows([{"messages": TALK[:1]}], tokenizer, 64, train_on="all")[0]
    assert only_asked.labels == only_asked.ids


def test_text_learns_everything_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_rows([{"text": "schön 漢字"}], tokenizer, 64)[0]
    assert example.ids == example.labels == [*tokenizer("schön 漢字")["input_ids"], tokenizer.eos_token_id]
    ended = encode_rows([{"text": "schön 漢字<|end|>"}], tokenizer, 64)[0]
    assert ended.ids == example.ids


def test_both_chat_spellings_agree(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = [{"from": "human", "value": "capital?"}, {"from": "gpt", "value": "Berga", "weight": None}]
    parts = [TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "Berga"}]}]
    rows: list[Row] = [{"messages": TALK}, {"messages": json.dumps(TALK)}, {"messages": parts}]
    examples = encode_rows(rows, tokenizer, 64) + encode_rows([{"conversations": shared}], tokenizer, 64)
    reply = tokenizer("Berga<|end|>")["input_ids"]
    for example in examples:
        assert example.ids == tokenizer("<|user|>capital?<|end|><|assistant|>Berga<|end|>")["input_ids"]
        assert learnt(example) == reply == example.labels[-len(reply) :]


@pytest.mark.parametrize(
    "turns, message",
    [
        ([{"role": "usr", "content": "x"}], "turn 1: unknown role 'usr' .did you mean 'user'"),
        ([TALK[0], {"role": "assistant", "content": 3}], "turn 2: its content must be text, not int"),
        ([TALK[0], {"role": "assistant"}], "turn 2: its content must be text"),
        ([], "must be a list of turns"),
        ("hello", "must be a list of turns"),
    ],
)
def test_malformed_turns(tokenizer: PreTrainedTokenizerFast, turns, message: str) -> None:
    with pytest.raises(UserError, match=f"data: row 2: .*{message}"):
        encode_rows([{"messages": TALK}, {"messages": turns}], tokenizer, 64)


def test_chat_without_a_template_is_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="row 1: the tokenizer has no chat template"):
        encode_rows([{"messages": TALK}], plain, 64)


@pytest.mark.parametrize("given, asked", [("12", "Add\n\n12"), ("", "Add"), (None, "Add")])
def test_alpaca_with_a_template(tokenizer: PreTrainedTokenizerFast, given: str | None, asked: str) -> None:
    example = encode_rows([{"instruction": "Add", "input": given, "output": "42"}], tokenizer, 64)[0]
    assert example.ids == tokenizer(f"<|user|>{asked}<|end|><|assistant|>42<|end|>")["input_ids"]
    assert learnt(example) == tokenizer("42<|end|>")["input_ids"]


def test_alpaca_without_a_template(plain: PreTrainedTokenizerFast) -> None:
    rows: list[Row] = [{"instruction": "Add", "input": "12", "output": "42"}, {"instruction": "Go", "output": "so"}]
    first, second = encode_rows(rows, plain, 128)
    assert plain.decode(first.ids) == "### Instruction:\nAdd\n\n### Input:\n12\n\n### Response:\n42<|end|>"
    assert plain.decode(second.ids) == "### Instruction:\nGo\n\n### Response:\nso<|end|>"
    assert plain.decode(learnt(first)) == "42<|end|>"


def test_sentencepiece_adds_no_space_in_the_middle(sentencepiece: PreTrainedTokenizerFast) -> None:
    spaced, joined = encode_rows(
        [{"prompt": "a:", "completion": " b"}, {"prompt": "a:", "completion": "b"}], sentencepiece, 16
    )
    tokens = sentencepiece.convert_ids_to_tokens
    assert tokens(spaced.ids) == ["<s>", "▁a", ":", "▁b", "</s>"]
    assert tokens(joined.ids) == ["<s>", "▁a", ":", "b", "</s>"]
    assert spaced.labels[:3] == [-100] * 3 and learnt(spaced) == spaced.ids[3:]
    assert tokens(encode_prompt(sentencepiece, "a:").ids) == ["<s>", "▁a", ":"]


def test_too_long_prompt_loses_its_beginning(sentencepiece: PreTrainedTokenizerFast, caplog) -> None:
    row = {"prompt": "a:b:a:", "completion": " b"}
    example = encode_rows([row], sentencepiece, 6, where="f.jsonl")[0]
    assert sentencepiece.convert_ids_to_tokens(example.ids) == ["<s>", ":", "a", ":", "▁b", "</s>"]
    assert example.labels == [-100, -100, -100, -100, *example.ids[4:]]
    assert "f.jsonl: 1 of 1 rows were longer than max_length=6" in caplog.text


def test_too_long_completion_loses_its_end(sentencepiece: PreTrainedTokenizerFast) -> None:
    example = encode_rows([{"prompt": "a:", "completion": " b:a:b:a"}], sentencepiece, 4)[0]
    assert sentencepiece.convert_ids_to_tokens(example.ids) == ["<s>", "▁b", ":", "a"]
    assert example.labels == [-100, *example.ids[1:]]


def test_too_long_text_keeps_its_beginning(plain: PreTrainedTokenizerFast) -> None:
    example = encode_rows([{"text": "x" * 50}], plain, 8)[0]
    assert example.ids == example.labels == plain("x" * 50)["input_ids"][:8]


def test_too_long_conversation_loses_its_last_exchanges(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_rows([{"messages": TALK}], tokenizer, 64)[0]
    cut = encode_rows([{"messages": TALK * 3}], tokenizer, len(whole.ids) + 3)[0]
    assert (cut.ids, cut.labels) == (whole.ids, whole.labels)


def test_all_masked_row_is_refused_with_its_number(tokenizer: PreTrainedTokenizerFast, caplog) -> None:
    rows: list[Row] = [{"messages": TALK}, {"messages": TALK[:1]}]
    with pytest.raises(UserError, match="f: row 2: no token to learn from, all 5 are masked"):
        encode_rows(rows, tokenizer, 64, where="f")
    assert len(encode_rows(rows, tokenizer, 64, on_empty="skip")) == 1
    assert "1 of 2 rows had nothing to learn" in caplog.text
    with pytest.raises(UserError, match="none of the 1 rows"):
        encode_rows(rows[1:], tokenizer, 64, on_empty="skip")
    with pytest.raises(UserError, match="row 1: no token to learn"):
        encode_rows([{"text": ""}], tokenizer, 64)


def test_no_rows_and_no_room(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no rows"):
        encode_rows([], plain, 64)
    with pytest.raises(UserError, match="max_length=1"):
        encode_rows(ROWS, plain, 1)


def test_pad_as_end_token_is_still_learnt(plain: PreTrainedTokenizerFast) -> None:
    shared = train_tokenizer(TEXTS, 400, chat_template=None)
    shared.pad_token = shared.eos_token
    assert encode_rows(ROWS, shared, 64)[0].labels[-1] == shared.eos_token_id == shared.pad_token_id


def test_encode_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_prompt(tokenizer, "schön")
    assert example.ids == tokenizer("schön")["input_ids"] and set(example.labels) == {-100}
    with pytest.raises(UserError, match="prompt is empty"):
        encode_prompt(tokenizer, "")


def test_classifies_single_texts(bert: BertTokenizer) -> None:
    rows: list[Row] = [{"t": "it rains", "y": "wet"}, {"t": "it is dry", "y": "dry"}]
    examples, names = encode_classification(rows, bert, ["t"], "y")
    assert names == ["dry", "wet"]
    assert [e.label for e in examples] == [1, 0]
    assert examples[0].ids == [2, 5, 6, 3] and examples[0].token_types is None
    assert set(examples[0].labels) == {-100}


def test_classifies_pairs_and_cuts_the_longer(bert: BertTokenizer) -> None:
    rows: list[Row] = [{"a": "it rains", "b": "it is wet", "y": 1}]
    (example,), names = encode_classification(rows, bert, ["a", "b"], "y", ["no", "yes"])
    assert example.ids == [2, 5, 6, 3, 5, 7, 8, 3]
    assert example.token_types == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (example.label, names) == (1, ["no", "yes"])
    (cut,), _ = encode_classification(rows, bert, ["a", "b"], "y", ["no", "yes"], max_length=7)
    assert cut.ids == [2, 5, 6, 3, 5, 7, 3]


def test_numeric_labels_sort_as_numbers(bert: BertTokenizer) -> None:
    rows: list[Row] = [{"t": "it", "y": y} for y in (10, 9, 2)]
    examples, names = encode_classification(rows, bert, ["t"], "y")
    assert names == ["2", "9", "10"] and [e.label for e in examples] == [2, 1, 0]


def test_classification_errors(bert: BertTokenizer) -> None:
    rows: list[Row] = [{"t": "it", "y": "wet"}, {"t": "it", "y": "wte"}]
    with pytest.raises(UserError, match="row 2: unknown label 'wte' .did you mean 'wet'"):
        encode_classification(rows, bert, ["t"], "y", ["wet", "dry"])
    with pytest.raises(UserError, match="no column 'label'; columns found: t, y"):
        encode_classification(rows, bert, ["t"], "label")
    with pytest.raises(UserError, match="row 2: no 'y'"):
        encode_classification([rows[0], {"t": "it", "y": None}], bert, ["t"], "y")
