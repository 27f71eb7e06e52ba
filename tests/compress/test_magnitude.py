"""Magnitude pruning: exact sparsity, the right weights, and masks that hold."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.utils import prune

import burnish
from burnish import chain
from burnish.chain import Model
from burnish.compress import magnitude
from burnish.config import UserError
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.model.surgery import linears
from burnish.store.checkpoint import load, save

EXAMPLES = [Example(ids, [-100, *ids[1:]]) for ids in ([6, 7, 8, 9, 10], [20, 21, 22], [30, 9, 8, 31, 40, 41])]


def pruned(folder, *others, **options) -> Model:
    return chain.apply(load(folder), [{"magnitude": options}, *others])


def matrices(model: Model) -> dict[str, torch.Tensor]:
    found = {path: linear.weight.dequantize() for path, linear in linears(model.net)}
    return {path: matrix.detach().clone() for path, matrix in found.items()}


def zeros(model: Model) -> dict[str, torch.Tensor]:
    return {path: matrix == 0 for path, matrix in matrices(model).items()}


def fit(model: Model, steps: int = 3) -> None:
    train(model, EXAMPLES, TrainConfig(learning_rate=1e-2, max_steps=steps, weight_decay=0.1))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_matrix_has_the_sparsity_and_loses_what_torch_would_take(root, family, sparsity):
    base = load(tiny.folder(root, family))
    model = pruned(tiny.folder(root, family), sparsity=sparsity)
    for path, matrix in matrices(base).items():
        linear = torch.nn.Linear(*matrix.shape[::-1], bias=False)
        linear.weight.data.copy_(matrix)
        prune.l1_unstructured(linear, "weight", amount=round(sparsity * matrix.numel()))
        got = model.net.get_submodule(path).weight.dequantize()
        assert torch.equal(got, linear.weight)
        assert int((got == 0).sum()) == round(sparsity * got.numel())


def test_global_scope_ranks_over_all_matrices(root):
    base, model = load(tiny.folder(root, "llama")), pruned(tiny.folder(root, "llama"), scope="global", sparsity=0.6)
    before = torch.cat([m.abs().view(-1) for m in matrices(base).values()])
    after = torch.cat([m.view(-1) for m in matrices(model).values()])
    assert int((after == 0).sum()) == round(0.6 * len(after))
    assert before[after == 0].max() <= before[after != 0].min()
    assert len({round(float(z.float().mean()), 3) for z in zeros(model).values()}) > 1


@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("3:4", 3, 4)])
def test_n_of_m(root, pattern, kept, group):
    base, model = load(tiny.folder(root, "gpt2")), pruned(tiny.folder(root, "gpt2"), pattern=pattern)
    assert model.chain[0].config.sparsity == 1 - kept / group
    for (path, before), after in zip(matrices(base).items(), matrices(model).values(), strict=True):
        size, left = before.abs().view(-1, group), (after != 0).view(-1, group)
        assert (left.sum(1) == kept).all(), path
        assert (size.masked_fill(~left, torch.inf).amin(1) >= size.masked_fill(left, 0).amax(1)).all(), path


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"scope": "global", "sparsity": 0.7}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_hold_through_training_saving_and_training_on(root, tmp_path, family, options):
    model = pruned(tiny.folder(root, family), "full", **options)
    before, start = zeros(model), matrices(model)
    fit(model)
    after = matrices(model)
    for path in before:
        assert torch.equal(after[path] == 0, before[path]) and not torch.equal(after[path], start[path])
    again = burnish.load(save(model, tmp_path))
    fit(again)
    for path, mask in zeros(again).items():
        assert torch.equal(mask, before[path]) and not torch.equal(matrices(again)[path], after[path])


def test_only_the_targets_are_pruned(root):
    model = pruned(tiny.folder(root, "bert"), target_modules=["query", "mlp.up_proj"], sparsity=0.5)
    touched = {path for path, mask in zeros(model).items() if mask.any()}
    assert touched == {f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert model.net.embed_tokens.weight.ne(0).all()


def test_masks_take_one_bit_a_weight(root):
    model = pruned(tiny.folder(root, "llama"))
    weights = sum(m.numel() for m in matrices(model).values())
    assert sum(p.numel() for p in model.net.techniques["magnitude"].parameters()) == weights / 8


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9)])
def test_packed_masks_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(magnitude.unpack(magnitude.pack(mask), mask.shape), mask)


def test_pruning_then_quantising_then_lora(root, tmp_path):
    """[magnitude, nf4, lora]: zeros stay zeros in NF4, whose seventh level is 0."""
    model = pruned(tiny.folder(root, "llama"), "nf4", "lora", sparsity=0.5)
    before = zeros(model)
    assert all(mask.float().mean() >= 0.5 for mask in before.values())
    fit(model)
    again = burnish.load(save(model, tmp_path))
    assert all(torch.equal(mask, before[path]) for path, mask in zeros(again).items())


@pytest.mark.parametrize(
    ("before", "options", "reason"),
    [
        ([], {"sparsity": 1.0}, "sparsity is 1.0; it must be at least 0 and below 1"),
        ([], {"sparsity": -0.1}, "sparsity is -0.1"),
        ([], {"pattern": "4:2"}, "neither 'unstructured' nor 'n:m'"),
        ([], {"pattern": "half"}, "neither 'unstructured' nor 'n:m'"),
        ([], {"pattern": "2:5"}, "needs input widths that 5 divides"),
        (["nf4"], {}, "layers.0.self_attn.q_proj is stored as NF4; prune before quantising"),
        (["int8"], {}, "is stored as Int8; prune before quantising"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(root, before, options, reason):
    model = load(tiny.folder(root, "llama"))
    chain.apply(model, before)
    want = matrices(model)
    with pytest.raises(UserError, match=reason):
        chain.apply(model, [{"magnitude": options}])
    assert all(torch.equal(matrix, want[path]) for path, matrix in matrices(model).items())
    assert len(model.chain) == len(before) and "magnitude" not in model.net.techniques
