"""AWQ and SmoothQuant: the function stays, the rounding that follows costs less, and their factors are the papers'."""

from __future__ import annotations

import pytest
import tiny
import torch

from burnish import chain
from burnish.chain import Context, forward
from burnish.compress import calibration, scaling
from burnish.compress.grouped import Form
from burnish.config import UserError
from burnish.model.linear import Unread
from burnish.model.surgery import linears
from burnish.store.checkpoint import load, save

DRAW = torch.Generator().manual_seed(0)
DATA = [{"input_ids": torch.randint(6, 50, (4, 20), generator=DRAW)}]
BATCH = {"input_ids": torch.randint(6, 50, (4, 20), generator=DRAW)}


def outliers(root, family: str):
    """A model some of whose activations are large, as those of large models are."""
    model = load(tiny.folder(root, family))
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[:3] *= 30
        for path, linear in linears(model.net):
            if path.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj")):
                linear.weight.dense[:, :3] /= 30
    return model


@torch.no_grad()
def states(model) -> torch.Tensor:
    return forward(model, BATCH)


def error(root, family: str, techniques) -> float:
    base = states(outliers(root, family))
    return float((states(chain.apply(outliers(root, family), techniques, Context(DATA))) - base).norm() / base.norm())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "falcon"])
@pytest.mark.parametrize("technique", ["awq", "smoothquant"])
def test_the_function_stays_while_weights_change(root, family, technique):
    model = outliers(root, family)
    before, weights = states(model), [linear.weight.dense.clone() for _, linear in linears(model.net)]
    chain.apply(model, [technique], Context(DATA))
    torch.testing.assert_close(states(model), before, atol=1e-4, rtol=1e-4)
    assert not all(
        torch.equal(linear.weight.dense, w) for (_, linear), w in zip(linears(model.net), weights, strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_rounding_costs_less_behind_awq(root, family):
    form = {"bits": 3, "group_size": 32}
    plain = error(root, family, [{"int_groups": form}])
    assert error(root, family, [{"awq": form}, {"int_groups": form}]) < 0.9 * plain


@pytest.mark.parametrize("name", ["gptq", "int_groups"])
def test_awq_scales_for_the_rounding_behind_it(root, name):
    """Unless told otherwise, in one call and to the same bits as where its options repeat the other's."""
    form = {"bits": 2, "group_size": 16, "sym": False}

    def scaled(options: dict) -> tuple[dict, torch.Tensor]:
        model = chain.apply(load(tiny.folder(root, "llama")), [{"awq": options}, {name: form}], Context(DATA))
        found = chain.describe(model)[0]["config"]
        return {key: found[key] for key in form}, states(model)

    (found, given), (_, wanted) = scaled({}), scaled(form)
    assert found == form and torch.equal(given, wanted)
    assert scaled({"bits": 4})[0] == form | {"bits": 4}
    alone = chain.apply(load(tiny.folder(root, "llama")), ["awq"], Context(DATA))
    assert alone.chain[0].config.bits == 4


def test_awq_before_gptq_is_saved_as_one_chain(root, tmp_path):
    model = load(tiny.folder(root, "llama"))
    chain.apply(model, ["awq", {"gptq": {"bits": 4, "group_size": 16}}], Context(DATA))
    assert torch.equal(states(load(save(model, tmp_path))), states(model))


CHAINS = [
    ["awq", {"gptq": {"bits": 3, "group_size": 16}}],
    ["awq", {"gptq": {"group_size": 16, "target_modules": ["up_proj", "o_proj"]}}],
    ["smoothquant", "awq", "int8"],
]


@pytest.mark.parametrize("techniques", CHAINS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_in_their_files_but_for_their_layers_turn(root, family, dtype, techniques, monkeypatch):
    """At no time those of two layers are in memory, and the result is the same to the bit."""
    folder, most, scale = tiny.folder(root, family), [], scaling.Fold.scale
    early, late = load(folder, dtype), load(folder, dtype, techniques=techniques)
    data = calibration.batches(early, Context(), 3, 12, "awq")
    assert any(isinstance(linear.weight, Unread) for _, linear in linears(late.net))

    def counted(fold, factors):
        held = {path for path, x in linears(late.net) if isinstance(x.weight, Unread) and x.weight.held}
        most.append(len({path.split("layers.")[1].split(".")[0] for path in held}))
        scale(fold, factors)

    chain.apply(early, techniques, Context(data))
    monkeypatch.setattr(scaling.Fold, "scale", counted)
    chain.apply(late, techniques, Context(data))
    assert max(most) == 1 and not any(isinstance(linear.weight, Unread) for _, linear in linears(late.net))
    assert all(map(torch.equal, late.net.parameters(), early.net.parameters()))


def test_smoothquant_levels_activations_and_weights(root):
    """Equation 4 with alpha 0.5: the largest activation of each input then equals its largest weight."""
    model = chain.apply(outliers(root, "llama"), ["smoothquant"], Context(DATA))
    with calibration.computing(model.net):
        for layer, calls in calibration.in_turn(model, DATA, "smoothquant"):
            for fold in scaling.after_norms(layer, calls[0]):
                weights = torch.cat([*fold.pieces()]).abs().amax(0)
                torch.testing.assert_close(scaling.inputs(layer, calls, fold).largest, weights, atol=1e-4, rtol=1e-3)


def plainly(technique: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of x and the weight as the technique's errors are meant."""
    if technique == "awq":
        return x @ Form(3, 16).round(weight).dequantize().t()
    (p, a), (q, b) = ((torch.round(127 * m / m.abs().amax(1, True)), m.abs().amax(1, True)) for m in (x, weight))
    return (p @ q.t()) * a * b.t() / 127**2


@pytest.mark.parametrize(("technique", "options"), [("awq", {"bits": 3, "group_size": 16}), ("smoothquant", {})])
def test_errors_are_what_rounding_loses_of_the_outputs_before_and_after(root, technique, options):
    plain, model, told = outliers(root, "llama"), outliers(root, "llama"), []
    chain.apply(model, {technique: options}, Context(DATA, report=told.append, errors=True))
    found = {record["scaled"]: record for record in told}
    assert len(found) == len(told) == (12 if technique == "awq" else 10)
    assert [(told[n]["done"], told[n]["of"]) for n in (0, -1)] == [(1, 2), (2, 2)]
    for net, key in ((plain.net, "before"), (model.net, "error")):
        read: dict[str, torch.Tensor] = {}
        paths = [path for path, _ in linears(net) if path in found]
        if technique == "awq" and net is model.net:  # whose rows are scaled once more, by what reads them
            paths = [path for path in paths if not path.endswith("up_proj")]
        for path in paths:
            net.get_submodule(path).register_forward_pre_hook(
                lambda _, args, read=read, path=path: read.__setitem__(path, args[0])
            )
        with torch.no_grad():
            calibration.feed(net, DATA[0])
        for path in paths:
            x, weight = read[path], net.get_submodule(path).weight.dequantize().detach()
            want = x @ weight.t()
            lost = (plainly(technique, x, weight) - want).square().sum() / want.square().sum()
            assert found[path][key] == pytest.approx(float(lost), rel=0.01), (path, key)
    before, after = (sum(record[key] for record in told) for key in ("before", "error"))
    assert after < 0.9 * before


def test_no_errors_where_nobody_asks(root, monkeypatch):
    monkeypatch.setattr(scaling, "errors", None)
    told: list[dict] = []
    chain.apply(load(tiny.folder(root, "llama")), ["awq", "smoothquant"], Context(DATA, report=told.append))
    assert not told


def test_which_projections_read_what(root):
    """Folds of a layer, as (source, readers), by the last words of their paths."""

    def folds(family: str) -> set[tuple[str, ...]]:
        model = load(tiny.folder(root, family))
        names = {module: name.rpartition(".")[2] for name, module in model.net.named_modules()}
        with calibration.computing(model.net):
            layer, calls = next(calibration.in_turn(model, DATA, "awq"))
            found = [*scaling.after_norms(layer, calls[0]), *scaling.after_projections(layer)]
        return {(names[fold.source], *(names[reader] for reader in fold.readers)) for fold in found}

    assert folds("llama") == {
        ("input_layernorm", "q_proj", "k_proj", "v_proj"),
        ("post_attention_layernorm", "gate_proj", "up_proj"),
        ("up_proj", "down_proj"),
    }
    assert ("pre_feedforward_layernorm", "gate_proj", "up_proj") in folds("gemma2")
    assert folds("opt") >= {("v_proj", "o_proj"), ("up_proj", "down_proj")}  # relu
    assert folds("gpt2") == {("input_layernorm", "qkv_proj"), ("post_attention_layernorm", "up_proj")}


def test_bad_input(root):
    model = chain.apply(load(tiny.folder(root, "llama")), ["lora"])
    with pytest.raises(UserError, match="is wrapped already; put 'awq' first"):
        chain.apply(model, ["awq"], Context(DATA))
    with pytest.raises(UserError, match="alpha is 2.0; give a number from 0 to 1"):
        chain.apply(load(tiny.folder(root, "llama")), {"smoothquant": {"alpha": 2.0}}, Context(DATA))
    spoilt = load(tiny.folder(root, "llama"))
    with torch.no_grad():
        spoilt.net.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(
        UserError, match=r"'awq': the activations that layers\.1\.self_attn\.q_proj reads are not finite"
    ):
        chain.apply(spoilt, ["awq"], Context(DATA))
    with pytest.raises(UserError, match="'awq': bits is 7"):
        chain.apply(load(tiny.folder(root, "llama")), {"awq": {"bits": 7}}, Context(DATA))
