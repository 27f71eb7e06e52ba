"""Ids and text without transformers, equal to transformers' own."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import tiny
from transformers import PreTrainedTokenizerFast

from burnish.store.hub import resolve
from burnish.store.lazy_tokenizer import LazyTokenizer
from burnish.store.tokenizer import load_tokenizer

TEXTS = ["", " ", "the cat runs", " Maren's  two\n\nlines", "a<|end|>b <|user|>", "été 你好 🙂", "12345 = 6.7"]


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (resolve("pebble") / name).exists():
            shutil.copy(resolve("pebble") / name, tmp_path / name)
    return tmp_path


def test_ids_and_text_are_transformers_own(folder):
    lazy, full = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(lazy) == len(full) and lazy.get_vocab() == full.get_vocab()
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(lazy, f"{name}_token_id") == getattr(full, f"{name}_token_id")
    assert {i: str(t) for i, t in lazy.added_tokens_decoder.items()} == {
        i: str(t) for i, t in full.added_tokens_decoder.items()
    }
    for text in TEXTS:
        for marks in (True, False):
            ids = lazy(text, add_special_tokens=marks)["input_ids"]
            assert ids == full(text, add_special_tokens=marks)["input_ids"]
        assert lazy(text).input_ids == ids and lazy.convert_ids_to_tokens(ids) == full.convert_ids_to_tokens(ids)
        for skip in (True, False):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert lazy.decode(ids, **options) == full.decode(ids, **options)
    for i in (0, 1, 300):
        assert lazy.convert_ids_to_tokens(i) == full.convert_ids_to_tokens(i)
        assert lazy.decode(i, clean_up_tokenization_spaces=False) == full.decode(i, clean_up_tokenization_spaces=False)
    assert type(lazy) is LazyTokenizer


def change(tokenizer):
    tokenizer.pad_token = "<|end|>"
    return tokenizer


@pytest.mark.parametrize("asked", [
    lambda tokenizer: tokenizer.chat_template and tokenizer,
    lambda tokenizer: tokenizer(["a", "b"]) and tokenizer,
    lambda tokenizer: tokenizer("a", return_tensors="pt") and tokenizer,
    lambda tokenizer: tokenizer.decode([5]) and tokenizer,
    change,
    copy.deepcopy,
    lambda tokenizer: pickle.loads(pickle.dumps(tokenizer)),
])  # fmt: skip
def test_anything_else_makes_it_transformers_own(folder, asked):
    tokenizer = asked(load_tokenizer(folder))
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer("the cat").input_ids
    assert tokenizer.pad_token_id == (1 if asked is change else 0)


@pytest.mark.parametrize("changes", [
    {"add_bos_token": True},
    {"pad_token": "a pad token that tokenizer.json lacks"},
    {"unk_token": "e"},
    {"added_tokens_decoder": {"1": {"content": "<|end|>", "special": False}}},
])  # fmt: skip
def test_files_that_ask_for_more_are_left_to_transformers(folder, changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert isinstance(load_tokenizer(folder), PreTrainedTokenizerFast)


def test_generating_from_a_plain_prompt_imports_no_transformers(root):
    code = (
        "import sys; from burnish.cli import main\n"
        f"main(['generate', {str(tiny.folder(root, 'llama'))!r}, '--prompt', 'the cat', '--max-new-tokens', '2'])\n"
        "assert 'transformers' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
