"""DoRA, trained biases, saved modules and ranks by module: peft's arithmetic, gradients and folders."""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import torch
from test_lora_peft import CLOSE, IDS, NATIVE, ours, reference, theirs, theirs_written

import burnish
from burnish import chain
from burnish.chain import Context, forward
from burnish.config import UserError
from burnish.model.linear import Linear
from burnish.model.surgery import linears
from burnish.store.checkpoint import load, save
from burnish.tune import lora

FIRST = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}
NORM = {"llama": "norm", "gpt2": "ln_f", "bert": "LayerNorm"}
WHOLE = {"llama": "lm_head", "gpt2": "attn.c_proj", "bert": "attention.output.dense"}
OPTIONS = {
    "dora": lambda family: {"use_dora": True},
    "dora and rslora": lambda family: {"use_dora": True, "use_rslora": True},
    "all biases": lambda family: {"bias": "all"},
    "lora's biases, dora": lambda family: {"bias": "lora_only", "use_dora": True},
    "saved modules": lambda family: {"modules_to_save": [NORM[family], WHOLE[family]]},
    "patterns": lambda family: {"rank_pattern": {FIRST[family]: 2}, "alpha_pattern": {FIRST[family]: 3}},
    "one layer": lambda family: {"layers_to_transform": [1]},
}
CASES = [(family, name) for family in FIRST for name in OPTIONS]


def disturb(parameters, seed: int = 8) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def applied(folder, family: str, **options):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": NATIVE.get(family), **options}
    return chain.apply(load(folder), {"lora": settings}, Context(seed=1))


@pytest.mark.parametrize(("family", "option"), CASES)
def test_what_peft_trained_loads_here_and_merges(root, tmp_path, family, option):
    folder = tiny.folder(root, family)
    other = theirs_written(folder, family, tmp_path / "theirs", **OPTIONS[option](family))
    disturb(parameter for parameter in other.parameters() if parameter.requires_grad)
    other.save_pretrained(tmp_path / "theirs")
    want = theirs(other)
    model = load(tmp_path / "theirs")
    assert [link.name for link in model.chain] == ["lora"]
    torch.testing.assert_close(ours(model), want, **CLOSE)
    trained = sum(parameter.numel() for parameter in other.parameters() if parameter.requires_grad)
    assert sum(parameter.numel() for parameter in model.trainable().values()) == trained
    again = load(save(model, tmp_path / "ours"))
    torch.testing.assert_close(ours(again), ours(model), atol=0, rtol=0)
    assert chain.describe(again) == chain.describe(model)
    chain.merge(model)
    torch.testing.assert_close(ours(model), want, **CLOSE)
    save(model, tmp_path / "merged")
    torch.testing.assert_close(theirs(reference(tmp_path / "merged")), want, **CLOSE)


@pytest.mark.parametrize(("family", "option"), [case for case in CASES if case[1] != "one layer"])
def test_what_burnish_trained_loads_in_peft(root, tmp_path, family, option):
    folder = tiny.folder(root, family)
    model = applied(folder, family, **OPTIONS[option](family))
    torch.testing.assert_close(ours(model), ours(load(folder)), **CLOSE)
    disturb(model.trainable().values())
    want = ours(model)
    assert not torch.allclose(want, ours(load(folder)), atol=1e-2)
    save(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(reference(folder), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(theirs(loaded), want, **CLOSE)
    trained = sum(parameter.numel() for parameter in loaded.parameters() if parameter.requires_grad)
    assert sum(parameter.numel() for parameter in model.trainable().values()) == trained


def test_a_classifier_that_peft_trained_loads_with_its_head(root, tmp_path):
    folder = tiny.folder(root, "bert", "classification")
    other = theirs_written(folder, "bert", tmp_path / "theirs", task_type="SEQ_CLS", use_dora=True)
    disturb(parameter for parameter in other.parameters() if parameter.requires_grad)
    other.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    assert [link.name for link in model.chain] == ["lora"] and model.chain[0].config.modules_to_save == ["score"]
    torch.testing.assert_close(ours(model), theirs(other), **CLOSE)
    loaded = peft.PeftModel.from_pretrained(reference(folder), save(model, tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(loaded), theirs(other), **CLOSE)
    config = tmp_path / "theirs" / "adapter_config.json"
    words = tiny.folder(root, "bert")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(words)}))
    with pytest.raises(UserError, match="missing bert.pooler.dense.weight"):
        load(tmp_path / "theirs")


def test_a_projection_that_no_token_reaches_has_gradients_of_zero():
    layer = lora.LoRALinear(Linear(8, 4).requires_grad_(False), lora.Config(r=2))
    layer(torch.zeros(0, 8)).sum().backward()
    assert layer.lora_A.grad.shape == (2, 8) and layer.lora_B.grad.shape == (4, 2)
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("family", FIRST)
def test_gradients_of_dora_are_pefts(root, tmp_path, family, dropout):
    folder = tiny.folder(root, family)
    options = {"use_dora": True, "bias": "lora_only", "lora_dropout": dropout, "target_modules": [FIRST[family]]}
    other = theirs_written(folder, family, tmp_path, **options)
    model = load(tmp_path)
    net = model.net.train() if dropout else model.net
    if dropout:
        peers = [part for part in other.modules() if hasattr(part, "lora_A")]
        [part.train() for peer in peers for part in (peer, *peer.lora_dropout.values())]
    torch.manual_seed(5)
    other(input_ids=IDS).logits.square().sum().backward()
    torch.manual_seed(5)
    net.logits(forward(model, {"input_ids": IDS})).square().sum().backward()
    path = next(iter(lora.layers(model)))
    mine = net.get_submodule(path)
    peer = other.base_model.model.get_submodule(net.layout.modules[path])
    pairs = [
        (mine.lora_A, peer.lora_A["default"].weight),
        (mine.lora_B, peer.lora_B["default"].weight),
        (mine.lora_magnitude_vector, peer.lora_magnitude_vector["default"].weight),
    ]
    pairs += [(mine.base.bias, peer.base_layer.bias)] if mine.base.bias is not None else []
    for own, their in pairs:
        assert their.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, their.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("store", ["int8", "nf4"])
def test_dora_over_quantised_weights_is_dora_over_what_they_stand_for(root, store):
    model = chain.apply(load(tiny.folder(root, "llama")), [store, {"lora": {"use_dora": True}}])
    dense = applied(tiny.folder(root, "llama"), "llama", r=8, lora_alpha=16, target_modules=None, use_dora=True)
    stored, layers = dict(linears(model.net)), lora.layers(model)
    with torch.no_grad():
        for path, linear in linears(dense.net):
            linear.weight.dense.copy_(stored[path].weight.dequantize())
        for path, layer in lora.layers(dense).items():
            layer.load_state_dict({k: v for k, v in layers[path].state_dict().items() if "lora" in k}, strict=False)
    for each in (model, dense):
        disturb(each.trainable().values())
    torch.testing.assert_close(ours(model), ours(dense), **CLOSE)
    net = model.net
    net.logits(forward(model, {"input_ids": IDS})).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.trainable().values())


def test_the_known_norm_follows_every_change(root):
    model = applied(tiny.folder(root, "llama"), "llama", use_dora=True)
    layer = next(iter(lora.layers(model).values()))
    first = layer.norm()
    assert layer.norm() is first
    disturb([layer.lora_B])
    torch.testing.assert_close(
        layer.norm(), layer.folded(layer.base.weight.dense).norm(dim=1) * 0 + layer.folded_norm()
    )
    assert not torch.allclose(layer.norm(), first, atol=1e-3)
    changed = layer.norm()
    with torch.no_grad():
        layer.base.weight.dense.mul_(2)
    assert not torch.allclose(layer.norm(), changed, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gpt2", {"modules_to_save": ["lm_head"]}, "'lm_head' shares its matrix"),
        ("gpt2", {"modules_to_save": ["wte"]}, "'embed_tokens' shares its matrix"),
        ("llama", {"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' is no module .* mean 'lm_head'"),
        ("llama", {"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' matches none .*mean 'v_proj'"),
        ("llama", {"rank_pattern": {"*q_proj": 2}}, r"rank_pattern: '\*q_proj' is no regular expression: nothing to"),
        ("llama", {"target_modules": "q_proj("}, r"target_modules: 'q_proj\(' is no regular expression: missing"),
        ("llama", {"target_modules": []}, "target_modules is empty"),
        ("llama", {"lora_dropout": 2.0}, "lora_dropout is 2.0; it must be at least 0 and below 1"),
        ("llama", {"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj is 0; it must be at least 1"),
    ],
)
def test_refused_options(root, family, options, reason):
    with pytest.raises(UserError, match=reason):
        applied(tiny.folder(root, family), family, **options)


def test_a_quantised_module_is_not_saved_whole(root):
    with pytest.raises(UserError, match="'layers.0.self_attn.o_proj' is stored quantised and cannot train"):
        chain.apply(load(tiny.folder(root, "llama")), ["nf4", {"lora": {"modules_to_save": ["o_proj"]}}])


@pytest.mark.parametrize("module", ["lm_head", "wte"])
def test_one_of_two_tied_matrices_goes_through_peft(root, tmp_path, module):
    other = theirs_written(tiny.folder(root, "gpt2"), "gpt2", tmp_path, modules_to_save=[module])
    disturb(parameter for parameter in other.parameters() if parameter.requires_grad)
    other.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert [link.name for link in model.chain] == ["peft:lora"]
    torch.testing.assert_close(ours(model), theirs(other), **CLOSE)


def test_an_adapter_says_which_base_it_was_made_for(root, tmp_path):
    save(applied(tiny.folder(root, "llama"), "llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "burnish.json"
    record = json.loads(path.read_text())
    other = tiny.write(tmp_path / "other", tiny.reference("llama", initializer_range=0.3))
    path.write_text(json.dumps({**record, "base": str(other)}))
    same = f"on .*other: made for another base: the same shape, other weights .identity {record['identity'][:12]}, not "
    with pytest.raises(UserError, match=same):
        load(tmp_path / "adapter")
    wider = tiny.write(tmp_path / "wider", tiny.reference("llama", hidden_size=48))
    path.write_text(json.dumps({**record, "base": str(wider)}))
    with pytest.raises(UserError, match="made for another base: hidden_size 32, not 48 "):
        load(tmp_path / "adapter")
    path.unlink()
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(wider)}))
    with pytest.raises(UserError, match=r"lora_A has shape \[4, 32\] where \[4, 48\] is needed"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    "techniques",
    [
        ["lora"],
        [{"lora": {"use_dora": True, "bias": "all", "modules_to_save": ["norm"]}}],
        ["nf4", {"lora": {"target_modules": "all-linear"}}],
        ["ia3"],
    ],
)
def test_a_merge_is_undone(root, tmp_path, techniques):
    model = chain.apply(load(tiny.folder(root, "llama")), techniques)
    disturb(model.trainable().values())
    want, links = ours(model), chain.describe(model)
    trains, identity = set(model.trainable()), model.identity
    assert burnish.merge(model, keep=True) and not any(link.name == techniques[-1] for link in model.chain)
    burnish.unmerge(model)
    torch.testing.assert_close(ours(model), want, atol=0, rtol=0)
    assert (chain.describe(model), set(model.trainable()), model.identity) == (links, trains, identity)
    torch.testing.assert_close(ours(load(save(model, tmp_path))), want, atol=0, rtol=0)


def test_what_was_not_kept_or_was_built_upon_is_not_undone(root):
    model = applied(tiny.folder(root, "llama"), "llama")
    chain.merge(model)
    with pytest.raises(UserError, match="merge with keep=True"):
        chain.unmerge(model)
    model = applied(tiny.folder(root, "llama"), "llama")
    chain.merge(model, keep=True)
    chain.apply(model, "nf4")
    with pytest.raises(UserError, match="applied since the merge"):
        chain.unmerge(model)
    model = chain.apply(load(tiny.folder(root, "llama")), "peft:ia3")
    with pytest.raises(UserError, match="'peft:ia3' cannot be taken out again"):
        chain.merge(model, keep=True)
