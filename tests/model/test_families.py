"""Every family against transformers on tiny random models."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

import burnish
from burnish.chain import forward
from burnish.config import UserError
from burnish.model.cache import KVCache
from burnish.store.checkpoint import save

CASES = [(family, head) for family in tiny.FAMILIES for head in ("", "classification")] + [
    ("bert", "none"),
    ("opt", "none"),
    ("gpt_neox", "none"),
    ("gemma3_text", "none"),
]
NO_POSITION_IDS = ("bloom", "mpt")


def ids(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(6, 80, (rows, length), generator=torch.Generator().manual_seed(1))


def outputs(reference, **inputs) -> torch.Tensor:
    with torch.no_grad():
        out = reference(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def ours(model, batch) -> torch.Tensor:
    with torch.no_grad():
        hidden = forward(model, batch)
        if model.spec.head == "none":
            return hidden
        if model.spec.head == "classification":
            mask = batch.get("attention_mask", torch.ones(hidden.shape[:2], dtype=torch.bool))
            hidden = model.net.pool(hidden, mask)
        return model.net.logits(hidden)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_logits_equal_transformers(root, family, head):
    folder = tiny.folder(root, family, head)
    reference, model = tiny.reference(family, head), burnish.load(folder)
    x = ids()
    torch.testing.assert_close(ours(model, {"input_ids": x}), outputs(reference, input_ids=x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_equals_transformers(root, family, side):
    reference, model = tiny.reference(family), burnish.load(tiny.folder(root, family))
    x, mask = ids(), torch.ones(3, 11, dtype=torch.bool)
    for row, pads in enumerate((0, 4, 7)):
        mask[row, :pads] = False
        if side == "right":
            mask[row] = mask[row].flip(0)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    extra = {} if family in NO_POSITION_IDS else {"position_ids": positions}
    want = outputs(reference, input_ids=x, attention_mask=mask.long(), **extra)
    got = ours(model, {"input_ids": x, "attention_mask": mask})
    torch.testing.assert_close(got[mask], want[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_classifier_reads_the_last_token_of_padded_rows(root, family, side):
    folder = tiny.folder(root, family, "classification")
    reference, model = tiny.reference(family, "classification"), burnish.load(folder)
    x, mask = ids(), torch.arange(11) >= torch.tensor([[0], [4], [7]])
    mask = mask if side == "left" else mask.flip(1)
    x = x.masked_fill(~mask, reference.config.pad_token_id)
    extra = {} if family in NO_POSITION_IDS else {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    want = outputs(reference, input_ids=x, attention_mask=mask.long(), **extra)
    got = ours(model, {"input_ids": x, "attention_mask": mask})
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_cache_equals_one_forward(root, family, padded):
    model = burnish.load(tiny.folder(root, family))
    x, mask = ids(), torch.ones(3, 11, dtype=torch.bool)
    if padded:
        mask[1, :3] = False
        mask[2, :5] = False
    whole = ours(model, {"input_ids": x, "attention_mask": mask})
    cache = KVCache(model.spec, 3, 11, torch.float32)
    pieces = []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 11)):
        batch = {"input_ids": x[:, start:end], "attention_mask": mask[:, start:end]}
        with torch.no_grad():
            pieces.append(model.net.logits(forward(model, batch, cache)))
    torch.testing.assert_close(torch.cat(pieces, 1)[mask], whole[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_saved_folder_reloads_in_transformers(root, tmp_path, family, head):
    model = burnish.load(tiny.folder(root, family, head))
    save(model, tmp_path)
    architecture = getattr(transformers, model.hf_config["architectures"][0])
    again, info = architecture.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = ids()
    want = outputs(tiny.reference(family, head), input_ids=x)
    torch.testing.assert_close(outputs(again.eval(), input_ids=x), want, atol=1e-5, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"]
    torch.testing.assert_close(ours(burnish.load(tmp_path), {"input_ids": x}), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_llama_variants(tmp_path, changes):
    reference = tiny.reference("llama", **changes)
    reference.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    x = ids()
    got = ours(burnish.load(tmp_path), {"input_ids": x})
    torch.testing.assert_close(got, outputs(reference, input_ids=x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0, "beta_fast": 4.0,
     "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0,
     "mscale": 1.0, "mscale_all_dim": 0.7},
])  # fmt: skip
def test_llama_rotary_scaling(tmp_path, rope):
    reference = tiny.reference("llama", rope_parameters=rope)
    reference.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    x = ids(length=40)
    got = ours(burnish.load(tmp_path), {"input_ids": x})
    torch.testing.assert_close(got, outputs(reference, input_ids=x), atol=1e-4, rtol=0)


def test_sharded_and_base_only_checkpoints(tmp_path):
    reference = tiny.reference("gpt2")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    reference.transformer.save_pretrained(tmp_path / "base")
    x = ids()
    for name in ("shards", "base"):
        tiny.tokenizer().save_pretrained(tmp_path / name)
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    got = ours(burnish.load(tmp_path / "shards"), {"input_ids": x})
    torch.testing.assert_close(got, outputs(reference, input_ids=x), atol=1e-4, rtol=0)
    hidden = ours(burnish.load(tmp_path / "base"), {"input_ids": x})
    torch.testing.assert_close(hidden, outputs(reference.transformer, input_ids=x), atol=1e-4, rtol=0)


def test_a_row_beyond_learned_positions_is_the_users_error(root):
    net = burnish.load(tiny.folder(root, "gpt2")).net
    room = net.spec.max_positions
    assert net(torch.zeros(1, room, dtype=torch.long)).shape[1] == room
    with pytest.raises(UserError, match=f"a row of {room + 1} tokens is longer than the model's {room} positions"):
        net(torch.zeros(1, room + 1, dtype=torch.long))
