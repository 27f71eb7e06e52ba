"""What a family's config can switch on, against transformers; and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families import NO_POSITION_IDS, ids, ours, outputs

import burnish
from burnish import chain
from burnish.config import UserError
from burnish.model.cache import KVCache
from burnish.model.families import FAMILIES, read_spec
from burnish.store.checkpoint import load, save

LENGTH = 17
OLD_FALCON = {"new_decoder_architecture": False, "num_kv_heads": None, "bias": False}
FALCON_RW = {**OLD_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
VARIANTS = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 1, "head_dim": 16}),
    ("mistral", {"sliding_window": 9, "tie_word_embeddings": True}),
    ("qwen2", {"layer_types": None, "max_window_layers": 1, "num_hidden_layers": 3}),
    ("qwen2", {"layer_types": None, "use_sliding_window": False, "tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0, "attention_bias": True}),
    ("qwen3", {"tie_word_embeddings": True, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}),
    ("gemma2", {"layer_types": ["full_attention", "full_attention"], "attention_bias": True}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"], "final_logit_softcapping": 2.0}),
    ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": ROPE,
    }}),
    ("opt", {"tie_word_embeddings": False}),
    ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt_neox", {"attention_bias": False, "hidden_act": "gelu_fast", "rope_parameters": {
        **ROPE, "partial_rotary_factor": 0.5,
    }}),
    ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}),
    ("falcon", {"num_kv_heads": 1, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}),
    ("falcon", {"num_kv_heads": None, "ffn_hidden_size": 48, "activation": "gelu_pytorch_tanh"}),
    ("falcon", OLD_FALCON),
    ("falcon", {**OLD_FALCON, "alibi": True}),
    ("falcon", {**OLD_FALCON, "multi_query": False, "rope_parameters": ROPE}),
    ("falcon", {**OLD_FALCON, "parallel_attn": False}),
    ("falcon", FALCON_RW),
    ("mpt", {"n_heads": 4, "tie_word_embeddings": False, "d_model": 32}),
    ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_variants_equal_transformers(tmp_path, family, changes):
    reference = tiny.reference(family, **changes)
    model = burnish.load(tiny.write(tmp_path / "saved", reference))
    x, valid = ids(length=LENGTH), torch.ones(3, LENGTH, dtype=torch.bool)
    want = outputs(reference, input_ids=x)
    torch.testing.assert_close(ours(model, {"input_ids": x}), want, atol=1e-4, rtol=0)

    for side in ("left", "right"):
        mask = valid.clone()
        for row, pads in enumerate((0, 3, 9)):
            mask[row, :pads] = False
        mask = mask if side == "left" else mask.flip(1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        extra = {} if family in NO_POSITION_IDS else {"position_ids": positions}
        padded = outputs(reference, input_ids=x, attention_mask=mask.long(), **extra)
        got = ours(model, {"input_ids": x, "attention_mask": mask})
        torch.testing.assert_close(got[mask], padded[mask], atol=1e-4, rtol=0)
        cache, pieces = KVCache(model.spec, 3, LENGTH, torch.float32), []
        for start, end in ((0, 6), (6, 7), (7, 8), (8, LENGTH)):
            batch = {"input_ids": x[:, start:end], "attention_mask": mask[:, start:end]}
            with torch.no_grad():
                pieces.append(model.net.logits(chain.forward(model, batch, cache)))
        torch.testing.assert_close(torch.cat(pieces, 1)[mask], padded[mask], atol=1e-4, rtol=0)

    save(model, tmp_path / "again")
    architecture = getattr(transformers, model.hf_config["architectures"][0])
    again, info = architecture.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(outputs(again.eval(), input_ids=x), want, atol=1e-5, rtol=0)


FIELDS = {  # family -> fields of its Spec and the values that switch them off
    "mistral": {"sliding_layers": ()},
    "qwen2": {"sliding_layers": ()},
    "gemma2": {"sliding_layers": (), "attention_softcap": 0.0, "attention_scale": 0.0, "embed_scale": 0.0},
    "gemma3_text": {"sliding_layers": (), "rope_local_theta": 0.0, "attention_scale": 0.0},
    "opt": {"position_offset": 1},
    "gpt_neox": {"parallel_norms": 0},
}


@pytest.mark.parametrize(
    ("family", "field"), [(family, field) for family, fields in FIELDS.items() for field in fields]
)
def test_every_field_shows_in_the_outputs(root, family, field):
    model, x = load(tiny.folder(root, family)), {"input_ids": ids()}
    want = ours(model, x)
    plain = replace(model.spec, **{field: FIELDS[family][field]})
    for module in model.net.modules():
        if hasattr(module, "spec"):
            module.spec = plain
        if hasattr(module, "scale"):
            module.scale = plain.attention_scale or None
        if hasattr(module, "plain"):
            module.plain = not (plain.sandwich_norm or plain.parallel_norms)
    assert (ours(model, x) - want).abs().max() > 1e-3


def edit(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


OLDER = [
    ("falcon", {**OLD_FALCON}, {"n_head": 4, "n_layer": 2, "multi_query": True, "parallel_attn": True,
        "num_attention_heads": "absent", "num_hidden_layers": "absent", "num_kv_heads": "absent",
        "rope_parameters": "absent", "max_position_embeddings": "absent", "ffn_hidden_size": "absent",
        "activation": "absent"}),
    ("falcon", {}, {"n_head": 4, "n_layer": 2, "n_head_kv": 2, "num_attention_heads": "absent",
        "num_hidden_layers": "absent", "num_kv_heads": "absent", "num_ln_in_parallel_attn": "absent"}),
    ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
        {"rope_parameters": "absent", "rotary_pct": 0.5, "rotary_emb_base": 500, "attention_bias": "absent"}),
    ("mistral", {"rope_parameters": ROPE}, {"rope_parameters": "absent", "rope_theta": 500.0, "head_dim": "absent"}),
    ("qwen2", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": "absent", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gemma2", {}, {"layer_types": "absent", "rope_parameters": "absent"}),
    ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0}, "sliding_attention": ROPE}},
        {"rope_parameters": "absent", "layer_types": "absent", "sliding_window_pattern": 2, "rope_theta": 700.0,
         "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("mpt", {}, {"architectures": ["MPTForCausalLM"],
        "attn_config": {"alibi": True, "attn_impl": "torch", "clip_qkv": None, "softmax_scale": None}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "older"), OLDER)
def test_older_configs_read_the_same(tmp_path, family, changes, older):
    reference = tiny.reference(family, **changes)
    folder = tiny.write(tmp_path, reference)
    want = load(folder).spec
    edit(folder, **older)
    model, x = load(folder), ids(length=LENGTH)
    same = {"max_positions": 0}  # absent in the oldest
    assert {**vars(model.spec), **same} == {**vars(want), **same}
    got = ours(model, {"input_ids": x})
    torch.testing.assert_close(got, outputs(reference, input_ids=x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("old", "new"), [("embed_out.", "lm_head."), ("lm_head.", "embed_out.")])
def test_both_names_of_the_head_of_gpt_neox(root, tmp_path, old, new):
    folder = shutil.copytree(tiny.folder(root, "gpt_neox"), tmp_path / "x")
    want = ours(load(folder), {"input_ids": ids()})
    path = folder / "model.safetensors"
    save_file({name.replace(old, new): x for name, x in load_file(path).items()}, path, {"format": "pt"})
    assert torch.equal(ours(load(folder), {"input_ids": ids()}), want)


REFUSED = [
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: false"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: 16"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm: true"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine: false"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("mistral", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling type 'yarn' needs factor"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling type 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling type 'linear' needs factor"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: 'chunked_attention'"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types: 1 for 2 layers"),
    ("qwen2", {"rope_parameters": {"full_attention": ROPE, "sliding_attention": {}}}, "of their own for sliding"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
    ("falcon", {"parallel_attn": False}, "parallel_attn: false with new_decoder_architecture"),
    ("falcon", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn: 3"),
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "attn_config: alibi_bias_max: 16"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi: false"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln: true"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config: attn_type"),
    ("mpt", {"attn_config": {"rope": True}}, "attn_config: rope: true"),
    ("mpt", {"logit_scale": 0.5}, "logit_scale: 0.5"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type: 'rmsnorm'"),
    ("mpt", {"no_bias": False}, "no_bias: false"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: false"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("gpt_neox", {"hidden_act": "mish"}, "activation 'mish'"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(root, tmp_path, family, changes, reason):
    folder = shutil.copytree(tiny.folder(root, family), tmp_path / "x")
    edit(folder, **changes)
    with pytest.raises(UserError, match="config.json: ") as caught:
        load(folder)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "changes", "parts"), [
    ("falcon", {"num_kv_heads": 1, "bias": False}, ("query_key_value.weight has shape [64, 32]", "unexpected ")),
    ("qwen3", {"head_dim": 8}, ("q_norm.weight has shape [16]", "k_proj.weight has shape [32, 32]")),
    ("opt", {"max_position_embeddings": 60}, ("embed_positions.weight has shape [66, 32] where [62, 32]",)),
    ("gpt_neox", {"num_hidden_layers": 3}, ("missing gpt_neox.layers.2.attention.query_key_value.weight",)),
    ("mpt", {"expansion_ratio": 2}, ("ffn.up_proj.weight has shape [144, 36] where [72, 36]",)),
])  # fmt: skip
def test_a_config_that_contradicts_its_weights(root, tmp_path, family, changes, parts):
    folder = shutil.copytree(tiny.folder(root, family), tmp_path / "x")
    edit(folder, **changes)
    with pytest.raises(UserError, match="the weights do not fit config.json: ") as caught:
        load(folder)
    assert all(part in str(caught.value) for part in parts)


def test_a_tokenizer_beyond_the_embedding(root, tmp_path):
    folder = shutil.copytree(tiny.folder(root, "gemma3_text"), tmp_path / "x")
    tokenizer = tiny.tokenizer()
    words = [f"word{i}" for i in range(80 - len(tokenizer))]
    tokenizer.add_tokens([*words, "<image_soft_token>"])
    tokenizer.save_pretrained(folder)
    load(folder)  # the multimodal siblings' token stands for nothing in the text model
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has 83 tokens and the embedding 80 rows; nothing stands for 'more', 'one': "):
        load(folder)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_targets_are_pefts_and_go_by_the_familys_names(root, family):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS

    def targets(*options) -> set[str]:
        return set(chain.apply(load(tiny.folder(root, family)), {"lora": dict(options)}).trainable())

    assert targets() == targets(("target_modules", PEFTS[family]))
    assert len(targets()) == 2 * 2 * len(PEFTS[family])  # A and B, in two layers
    for native, foreign in FAMILIES[family].modules:
        if native.startswith("layers.{i}.") and native.endswith("_proj"):
            assert targets(("target_modules", [foreign.partition("{i}.")[2]]))


def test_the_nearest_family_is_named():
    with pytest.raises(UserError, match=r"model_type 'gptneox' is known neither .* \(did you mean 'gpt_neox'\?\)"):
        read_spec({"model_type": "gptneox"})
