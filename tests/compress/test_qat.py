"""Quantisation-aware training: its gradients, its codes, and the whole-number model that it becomes."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import torch.nn.functional as F

from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.cli import main
from burnish.compress.grouped import BITS, Form, Grouped
from burnish.compress.qat import Rounding
from burnish.config import UserError
from burnish.engine.loss import distillation_sum
from burnish.engine.order import collated
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.model.surgery import linears
from burnish.store.checkpoint import load, save

TEXTS = ([6, 7, 8, 9, 10], [20, 21, 22], [30, 9, 8, 31, 40, 41], [11, 12, 13, 14])
EXAMPLES = [Example(list(ids), list(ids)) for ids in TEXTS]
LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}
ROW8, GROUPS4 = {"qat": {"bits": 8, "group_size": -1}}, {"qat": {"bits": 4, "group_size": 16}}
ASYMMETRIC = {"qat": {"bits": 3, "group_size": 16, "sym": False}}
DISTILLED = {"qat": {"bits": 2, "group_size": 16, "distill": True}}


def made(root, *techniques, family: str = "llama") -> Model:
    return chain.apply(load(tiny.folder(root, family)), [*techniques], Context(seed=1))


def short_run(model: Model, folder=None, **settings) -> None:
    train(model, EXAMPLES, TrainConfig(folder, learning_rate=1e-2, max_steps=4, **settings))


@torch.no_grad()
def outputs(model: Model) -> torch.Tensor:
    batch = collated(model, EXAMPLES)
    return model.net.logits(forward(model, batch))[batch["attention_mask"]]


def rounding(model: Model) -> dict[str, Rounding]:
    return {path: module for path, module in model.net.named_modules() if isinstance(module, Rounding)}


def matrices(model: Model) -> dict[str, torch.Tensor]:
    return {path: linear.weight.dequantize().detach().clone() for path, linear in linears(model.net)}


def loss(model: Model) -> torch.Tensor:
    batch = collated(model, EXAMPLES)
    logits = model.net.logits(forward(model, batch))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 48, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_a_rounded_matrix_is_the_stored_one(bits, group_size, sym):
    form = Form(bits, group_size, sym)
    dense = torch.randn(20, 128, generator=torch.Generator().manual_seed(bits)) + 0.2
    before = dense.clone()
    assert torch.equal(form.rounded(dense), form.round(dense).dequantize())
    assert torch.equal(dense, before)


@pytest.mark.parametrize("technique", [ROW8, GROUPS4, ASYMMETRIC])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_gradients_are_those_at_the_rounded_weights(root, technique, family):
    """Of a plain network with the rounded weights in it."""
    if family == "gptj":
        import tiny_foreign

        model, plain = (load(tiny_foreign.folder(root, family)) for _ in "ab")
        chain.apply(model, technique)
    else:
        model, plain = made(root, technique, family=family), load(tiny.folder(root, family))
    with torch.no_grad():
        for _, linear in linears(plain.net):
            stored = linear.weight.dense
            stored.copy_(Form(**technique["qat"]).round(stored).dequantize())
    chain.apply(plain, ["full"])
    wanted, got = loss(plain), loss(model.net.train() and model)
    torch.testing.assert_close(got, wanted)
    wanted.backward(), got.backward()
    expected = {name: parameter.grad for name, parameter in plain.net.named_parameters()}
    found = {name.replace(".base.", "."): parameter.grad for name, parameter in model.net.named_parameters()}
    assert found.keys() == expected.keys() and len(rounding(model)) > 5
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4)


def test_through_lora_gradients_are_its_own_at_the_rounded_sum(root):
    """LoRA's chain rule from the gradient of a plain weight that is the rounded sum."""
    model = made(root, LORA, GROUPS4)
    with torch.no_grad():
        for layer in rounding(model).values():
            layer.base.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    plain = chain.apply(load(tiny.folder(root, "llama")), ["full"])
    weights = dict(linears(plain.net))
    with torch.no_grad():
        for path, layer in rounding(model).items():
            stored = weights[path].weight.dense
            stored.copy_(Form(4, 16).round(stored + 4.0 * layer.base.lora_B @ layer.base.lora_A).dequantize())
    loss(plain).backward(), loss(model.net.train() and model).backward()
    assert {name.rpartition(".")[2] for name in model.trainable()} == {"lora_A", "lora_B"}
    for path, layer in rounding(model).items():
        grad, lora = weights[path].weight.dense.grad, layer.base
        torch.testing.assert_close(lora.lora_A.grad, 4.0 * lora.lora_B.t() @ grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(lora.lora_B.grad, 4.0 * grad @ lora.lora_A.t(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("technique", [ROW8, GROUPS4, ASYMMETRIC])
def test_what_was_trained_is_stored_to_the_last_bit(root, tmp_path, technique):
    model = made(root, technique)
    before = matrices(model)
    short_run(model)
    dense = matrices(model)
    assert all(not torch.equal(dense[path], weight) for path, weight in before.items())
    want = outputs(model)
    batch = collated(model, EXAMPLES)
    trained = forward(model.net.train() and model, batch).detach()
    chain.finalize(model.net.eval() and model)
    assert not rounding(model) and not model.trainable()
    for path, linear in linears(model.net):
        assert isinstance(linear.weight, Grouped)
        assert torch.equal(linear.weight.dequantize(), Form(**technique["qat"]).round(dense[path]).dequantize())
    assert torch.equal(outputs(model), want)
    torch.testing.assert_close(forward(model, batch), trained, atol=2e-5, rtol=1e-4)
    again = load(save(model, tmp_path))
    assert torch.equal(outputs(again), want) and chain.describe(again) == chain.describe(model)
    assert chain.describe(chain.finalize(again)) == chain.describe(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LORA, {"lora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}}])
def test_lora_merges_into_the_codes_of_the_rounded_sum(root, tmp_path, lora, dtype):
    folder = save(load(tiny.folder(root, "llama"), dtype), tmp_path / "base")
    model = chain.apply(load(folder), [lora, GROUPS4])
    base = matrices(model)
    short_run(model)
    assert all(torch.equal(weight, base[path]) for path, weight in matrices(model).items())
    sums = {
        path: layer.base.folded(base[path].float()).detach() if layer.corrected else base[path]
        for path, layer in rounding(model).items()
    }
    want = outputs(model)
    assert chain.describe(chain.finalize(model))[1]["config"]["finalized"] is False
    save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load(tmp_path / "adapter")
    assert torch.equal(outputs(again), want)
    assert main(["merge", str(tmp_path / "adapter"), "--output-dir", str(tmp_path / "merged")]) == 0
    merged = load(tmp_path / "merged")
    assert torch.equal(outputs(merged), want)
    for path, linear in linears(merged.net):
        form = linear.weight.form
        assert (form.bits, form.group_size) == (4, 16)
        assert torch.equal(linear.weight.dequantize(), form.round(sums[path].to(dtype)).dequantize())
    assert torch.equal(outputs(load(save(merged, tmp_path / "again"))), want)


@pytest.mark.parametrize("techniques", [[ASYMMETRIC], [LORA, GROUPS4]])
def test_a_stopped_run_goes_on_from_the_weights_before_rounding(root, tmp_path, techniques):
    class Stop(Exception):
        pass

    def stop(step: int, *_) -> None:
        if step == 3:
            raise Stop

    config = TrainConfig(tmp_path, learning_rate=1e-2, max_steps=4, save_steps=2)
    whole = made(root, *techniques)
    train(whole, EXAMPLES, TrainConfig(learning_rate=1e-2, max_steps=4))
    with pytest.raises(Stop):
        train(made(root, *techniques), EXAMPLES, config, progress=stop)
    resumed = made(root, *techniques)
    train(resumed, EXAMPLES, config)
    for name, parameter in whole.trainable().items():
        assert torch.equal(parameter, resumed.trainable()[name]), name
    codes = {path: layer.stored().packed for path, layer in rounding(whole).items()}
    assert all(torch.equal(codes[path], layer.stored().packed) for path, layer in rounding(resumed).items())


@pytest.mark.parametrize("techniques", [[GROUPS4], [LORA, GROUPS4]])
def test_checkpointed_layers_train_the_same(root, techniques):
    plain, checkpointed = made(root, *techniques), made(root, *techniques)
    short_run(plain)
    short_run(checkpointed, gradient_checkpointing=True)
    for name, parameter in plain.trainable().items():
        assert torch.equal(parameter, checkpointed.trainable()[name]), name


def test_only_activations_are_kept_for_the_backward_pass(root):
    """Rounded matrices are made again."""
    model = made(root, GROUPS4)
    known = {parameter.data_ptr() for parameter in model.net.parameters()}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model.net.train() and model, collated(model, EXAMPLES))
    shapes = {linear.weight.shape for _, linear in linears(model.net)}
    assert kept and not shapes & set(kept)


def test_weights_stay_in_float32_and_the_rest_as_it_was(root, tmp_path):
    model = chain.apply(load(tiny.folder(root, "llama"), torch.bfloat16), [GROUPS4])
    short_run(model)
    assert {linear.weight.dequantize().dtype for _, linear in linears(model.net)} == {torch.float32}
    assert model.net.embed_tokens.weight.dtype == torch.bfloat16
    want = outputs(model)
    assert torch.equal(outputs(load(save(model, tmp_path))), want)


def test_a_changed_weight_is_rounded_anew_in_evaluation(root):
    model = made(root, GROUPS4)
    before = outputs(model)
    assert torch.equal(outputs(model), before)
    with torch.no_grad():
        for layer in rounding(model).values():
            layer.linear.weight.dense.mul_(1.5)
    changed = outputs(model)
    assert not torch.equal(changed, before)
    chain.finalize(model)
    assert torch.equal(outputs(model), changed)


def test_the_teacher_is_the_base_as_it_is(root):
    model, base = made(root, LORA, DISTILLED), load(tiny.folder(root, "llama"))
    batch = collated(model, EXAMPLES)
    kept = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        wanted = base.net.logits(forward(base, batch))[:, :-1][kept].softmax(-1)
        for layer in rounding(model).values():
            layer.base.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    student = model.net.logits(forward(model.net.train() and model, batch))[:, :-1][kept]
    expected = F.cross_entropy(student, wanted, reduction="sum")
    gradients = torch.autograd.grad(expected, list(model.trainable().values()))
    (teacher,) = chain.hooks(model, "teacher")
    got, count = distillation_sum(model, batch, teacher())
    torch.testing.assert_close(got, expected)
    assert count == kept.sum() and not any(layer.plain for layer in rounding(model).values())
    for mine, theirs in zip(torch.autograd.grad(got, list(model.trainable().values())), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_a_distilled_run_comes_nearer_to_the_base(root):
    base, model = load(tiny.folder(root, "llama")), made(root, LORA, DISTILLED)

    def divergence() -> float:
        told, known = outputs(model).log_softmax(-1), outputs(base).log_softmax(-1)
        return float(F.kl_div(told, known, log_target=True, reduction="sum"))

    before = divergence()
    train(model, EXAMPLES, TrainConfig(learning_rate=1e-2, max_steps=30))
    chain.merge(model)
    chain.finalize(model)
    assert divergence() < 0.7 * before


@pytest.mark.parametrize(
    ("techniques", "reason"),
    [
        ([{"qat": {"bits": 5}}], "bits is 5; choose one of 2, 3, 4, 8"),
        (["qat", "lora"], "weights are being rounded by 'qat'; put what else works on weights before it"),
        (["qat", "nf4"], "weights are being rounded by 'qat'"),
        (["int8", "qat"], "is stored as Int8 already"),
        (["ia3", "qat"], "is inside Scaled; put 'qat' before it"),
        ([{"adapters": {"size": 2}}, "qat"], "is inside Adapter; put 'qat' before it"),
        ([DISTILLED], "distill: put lora before it"),
        (["transfer", LORA, DISTILLED], "distill: only language models have a teacher"),
        ([{"lora": {"lora_dropout": 0.1}}, "qat"], "lora_dropout is 0.1; .* leave it at 0"),
    ],
)
def test_chains_that_are_refused(root, techniques, reason):
    with pytest.raises(UserError, match=reason):
        made(root, *techniques)


def test_pruned_weights_stay_zero_in_the_codes(root):
    model = made(root, "magnitude", GROUPS4)
    zeros = {path: weight == 0 for path, weight in matrices(model).items()}
    short_run(model)
    chain.finalize(model)
    for path, weight in matrices(model).items():
        assert zeros[path].any() and not weight[zeros[path]].any()


def test_from_the_shell(tmp_path, capsys):
    """Tuned, evaluated, written to a GGUF file and continued with an adapter on the whole numbers."""
    out, small = tmp_path / "out", ["--max-steps", "2", "--per-device-train-batch-size", "2", "--max-length", "64"]
    data = ["--data", "recipes/data/near.jsonl"]
    chained = ["--techniques", "[{qat: {bits: 3, group_size: 32}}]"]
    assert main(["tune", "pebble", *data, *chained, *small, "--output-dir", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 3
    assert main(["generate", str(out), "--prompt", "job Odile Kinlow =", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(out), "--type", "q8_0", "--output", str(tmp_path / "q.gguf")]) == 0
    further = ["--techniques", "[lora]", "--output-dir", str(tmp_path / "further")]
    assert main(["tune", str(out), *data, *small, *further]) == 0
    capsys.readouterr()
    assert {name.rpartition(".")[2] for name in load(tmp_path / "further").trainable()} == {"lora_A", "lora_B"}
