"""What a checkpoint brings survives tuning, merging, saving and reloading: tied embeddings, a resized vocabulary, added
tokens, and the dtype of its weights."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from burnish import chain
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.store.checkpoint import load, save
from burnish.store.data import encode_prompt

ADDED = ["<tool>", "<result>", "zebra"]
CHAINS = [["full"], [{"lora": {"r": 4, "target_modules": "all-linear"}}]]


@pytest.fixture(params=[("llama", True), ("llama", False), ("gpt2", True), ("bloom", True)], ids=str)
def folder(request, tmp_path):
    """A checkpoint with three added tokens, its embedding grown beyond them to a multiple of 8."""
    family, tied = request.param
    reference = tiny.reference(family, tie_word_embeddings=tied)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(ADDED[2:])
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED[:2]})
    reference.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    reference.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    return tmp_path / "grown"


def tuned(folder, techniques, dtype=None):
    model = chain.apply(load(folder, dtype=dtype), techniques)
    ids = encode_prompt(model.tokenizer, "the <tool> sees zebra <result>").ids
    train(model, [Example(ids, ids)] * 4, TrainConfig(max_steps=2, learning_rate=1e-2))
    return model


def check(model, folder, expected_dtype=torch.float32):
    """transformers reads the folder, and burnish too: the same logits, tokens and ties as `model`."""
    again, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(t)) for t in ADDED] == ADDED
    assert set(ADDED[:2]) <= set(tokenizer.all_special_tokens)
    assert again.dtype == expected_dtype
    shared = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert shared == model.spec.tied
    ids = torch.tensor([tokenizer("the <tool> sees zebra <result>")["input_ids"]])
    reloaded = load(folder)
    with torch.no_grad():
        want = model.net.logits(model.net(ids)).float()
        tolerance = {"atol": 1e-4, "rtol": 0} if expected_dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
        torch.testing.assert_close(again.eval()(ids).logits.float(), want, **tolerance)
        torch.testing.assert_close(reloaded.net.logits(reloaded.net(ids)).float(), want, **tolerance)
    assert want.shape[-1] == model.spec.vocab_size == again.config.vocab_size


@pytest.mark.parametrize("techniques", CHAINS, ids=["full", "lora"])
def test_ties_and_added_tokens_survive(folder, tmp_path, techniques):
    model = tuned(folder, techniques)
    chain.merge(model)
    save(model, tmp_path / "out")
    check(model.net.eval() and model, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("techniques", CHAINS, ids=["full", "lora"])
def test_weights_stay_in_their_dtype(tmp_path, techniques, dtype):
    tiny.reference("llama").to(dtype).save_pretrained(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    model = tuned(tmp_path / "base", techniques)
    assert {p.dtype for name, p in model.net.named_parameters() if "lora" not in name} == {dtype}
    chain.merge(model)
    save(model, tmp_path / "out")
    model.net.eval()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == dtype and {p.dtype for p in load(tmp_path / "out").net.parameters()} == {dtype}
    assert {p.dtype for p in load(tmp_path / "out", dtype=torch.float32).net.parameters()} == {torch.float32}
