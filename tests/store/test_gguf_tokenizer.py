"""Tokenizers in GGUF's metadata: the same ids there and back, for every way of splitting text that llama.cpp shares."""

from __future__ import annotations

import json

import pytest
import torch
from gguf_models import TEXTS, checkpoint
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from burnish.config import UserError
from burnish.store.checkpoint import load
from burnish.store.gguf import Piece, read_gguf, write_gguf
from burnish.store.gguf_model import write
from burnish.store.gguf_tokenizer import BYTES, PRE, rebuilt, written

SAMPLES = (
    "the cat sees THE dog",
    "It's 1234567 or 12,345.67; don't!  two  spaces\n\n\ttabs",
    "naïve Ünïcödé 日本語 🙂 x",
    " begins with a space",
    "<s>marked</s> <turn>words",
    "",
)


def byte_level(steps: list[dict]) -> PreTrainedTokenizerFast:
    from tokenizers.pre_tokenizers import ByteLevel

    empty = json.loads(Tokenizer(BPE()).to_str())
    both = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": BYTES}
    backend = Tokenizer.from_str(json.dumps(empty | both))
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *SAMPLES] * 3, trainer)
    backend.add_tokens(["<turn>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """Llama 2's kind: bytes for what has no token, ▁ for spaces, <s> before a text."""
    from tokenizers import normalizers, processors

    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    trainer = BpeTrainer(vocab_size=420, special_tokens=[*special, *bytes_], show_progress=False, max_token_length=12)
    backend.train_from_iterator(TEXTS * 3, trainer)
    data = json.loads(backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(data))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def back(tokenizer, path, **changes):
    """Through a file that holds nothing else."""
    metadata = {**written(tokenizer, len(tokenizer) + 5), **changes}
    write_gguf(path, metadata, {"x": Piece(0, (1,), lambda: torch.zeros(1))})
    return rebuilt(read_gguf(path))


@pytest.mark.parametrize("pre", PRE)
def test_ways_of_splitting_text(tmp_path, pre):
    tokenizer = byte_level(PRE[pre])
    assert written(tokenizer, len(tokenizer))["tokenizer.ggml.pre"] == pre
    again = back(tokenizer, tmp_path / "m.gguf")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, 1, None)
    for text in SAMPLES:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert again.decode(ids, clean_up_tokenization_spaces=False) == text
        plain = tokenizer.decode(ids, skip_special_tokens=True)
        assert again.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == plain


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_kind(tmp_path, prefix):
    tokenizer = sentencepiece(prefix)
    found = written(tokenizer, len(tokenizer))
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is prefix
    again = back(tokenizer, tmp_path / "m.gguf")
    for text in SAMPLES:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1 and again(text)["input_ids"] == ids
        if "<" not in text:  # with a space put after each mark
            assert again.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_what_is_put_around_a_text(tmp_path):
    tokenizer = byte_level(PRE["gpt-2"])
    ids = tokenizer("the cat")["input_ids"]
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert back(tokenizer, tmp_path / "m.gguf", **both)("the cat")["input_ids"] == [0, *ids, 1]
    llama3 = byte_level(PRE["llama-bpe"])
    path = tmp_path / "m.gguf"
    metadata = written(llama3, len(llama3))
    del metadata["tokenizer.ggml.add_bos_token"]  # which Llama 3's rule stands for
    write_gguf(path, metadata, {"x": Piece(0, (1,), lambda: torch.zeros(1))})
    assert rebuilt(read_gguf(path))("the cat")["input_ids"][0] == 0


def test_a_chat_template_loses_only_the_marks_of_what_is_learnt(tmp_path):
    tokenizer = byte_level(PRE["gpt-2"])
    tokenizer.chat_template = (
        "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}{{ eos_token }}{% endfor %}"
    )
    again = back(tokenizer, tmp_path / "m.gguf")
    turns = [{"role": "assistant", "content": "yes"}]
    want = tokenizer.apply_chat_template(turns, tokenize=False)
    assert again.apply_chat_template(turns, tokenize=False) == want == "yes</s>"
    assert "generation" not in read_gguf(tmp_path / "m.gguf").metadata["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "model 'gpt2' with splitting rule 'tekken' is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "model 'bert'"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "no list of texts"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "2 types of tokens for"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "a special token beyond them"),
        ({"tokenizer.ggml.merges": ["no such"]}, "cannot be read: "),
    ],
)
def test_tokenizers_that_cannot_be_read(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        back(byte_level(PRE["gpt-2"]), tmp_path / "m.gguf", **changes)


def test_tokenizers_that_llama_cpp_does_not_know():
    with pytest.raises(UserError, match="llama.cpp splits no text as this tokenizer does"):
        written(byte_level([{"type": "Whitespace"}, BYTES]), 400)
    lower = byte_level(PRE["gpt-2"])
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="Lowercase"):
        written(lower, 400)


@pytest.mark.parametrize("pre", [*PRE, "sentencepiece"])
def test_llama_cpp_gives_the_same_ids(tmp_path, pre):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = sentencepiece(True) if pre == "sentencepiece" else byte_level(PRE[pre])
    folder = checkpoint(tmp_path / "folder", "llama")
    import tiny

    tiny.reference("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load(folder)
    write(model, tmp_path / "m.gguf", "f16")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    for text in SAMPLES[:4]:
        got = llama.tokenize(text.encode(), add_bos=pre == "sentencepiece", special=True)
        assert got == tokenizer(text)["input_ids"], text
    llama.close()
