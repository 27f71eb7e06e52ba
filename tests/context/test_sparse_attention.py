"""Sparse attention in native models, against masks made by loops over pairs of positions."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

import burnish
from burnish import chain
from burnish.chain import Model, forward
from burnish.cli import main
from burnish.config import UserError
from burnish.context.sparse_attention import Config, apply
from burnish.engine.generate import GenerationConfig, generate
from burnish.model.bundle import Context
from burnish.store.checkpoint import save

LENGTH = 13
BLOCKS = {"block_size": 2, "global_blocks": 1, "window_blocks": 1, "random_blocks": 1, "seed": 3}
WINDOW = {"pattern": "window", "sliding_window": 3}
OPTIONS = [BLOCKS, WINDOW]


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(6, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def sparse(folder, options, *others) -> Model:
    return chain.apply(burnish.load(folder), [{"sparse_attention": options}, *others])


def allowed(model: Model, options, i: int, j: int, causal: bool) -> bool:
    """Whether position i sees position j."""
    if causal and j > i:
        return False
    if "sliding_window" in options:
        return abs(i - j) < options["sliding_window"]
    row, column = i // 2, j // 2
    drawn = bool(model.net.pattern(torch.tensor(2 * row + 1), torch.tensor(2 * column), causal))
    return row == column or row == 0 or column == 0 or drawn


def visible(model: Model, options, causal: bool) -> Tensor:
    return torch.tensor([[allowed(model, options, i, j, causal) for j in range(LENGTH)] for i in range(LENGTH)])


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "opt", "gpt_neox", "bert"])
def test_logits_equal_those_of_transformers_with_a_dense_mask(root, family, options):
    model, reference = sparse(tiny.folder(root, family), options), tiny.reference(family)
    seen = visible(model, options, family != "bert")
    near = seen & visible(model, {"sliding_window": 4}, True)  # the model's own window, where it has one
    masks = {"full_attention": additive(seen), "sliding_attention": additive(near)}
    mask = (
        masks
        if family in ("qwen2", "gemma2")
        else masks["sliding_attention" if family == "mistral" else "full_attention"]
    )
    with torch.no_grad():
        got = model.net.logits(forward(model, {"input_ids": ids()}))
        want = reference(input_ids=ids(), attention_mask=mask, position_ids=torch.arange(LENGTH)[None]).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def reached(states: Tensor, given: Tensor) -> Tensor:
    """bool (T, S): on which given embeddings (1, S, width) each state (1, T, hidden) depends."""
    rows = [torch.autograd.grad(state.sum(), given, retain_graph=True)[0].abs().sum(2)[0] > 0 for state in states[0]]
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_what_a_layer_reads(tmp_path, family, options):
    layers = "n_layers" if family == "mpt" else "n_layer" if family == "bloom" else "num_hidden_layers"
    model = sparse(tiny.write(tmp_path, tiny.reference(family, **{layers: 1})), options)
    x = model.net.embed(ids(1)).detach().requires_grad_()
    assert torch.equal(reached(model.net(inputs_embeds=x), x), visible(model, options, True))


@pytest.mark.parametrize("options", OPTIONS)
def test_both_sides_of_an_encoder_decoder(root, options):
    model = sparse(tiny.folder(root, "mt5"), options)  # of one layer each
    source, target = (model.net.embed(ids(1)).detach().requires_grad_() for _ in range(2))
    states = model.net(inputs_embeds=target, source_embeds=source)
    assert torch.equal(reached(states, target), visible(model, options, True))
    assert reached(states, source).all()  # attention to the source is whole
    model = chain.apply(burnish.load(tiny.folder(root, "mt5")), ["transfer", {"sparse_attention": options}])
    states = model.net(inputs_embeds=source)
    assert torch.equal(reached(states, source), visible(model, options, False))


@pytest.mark.parametrize("family", ["llama", "bloom", "bert", "gemma3_text"])
@pytest.mark.parametrize(
    "options", [{"pattern": "window", "sliding_window": LENGTH}, {}, {**BLOCKS, "global_blocks": 9}]
)
def test_a_pattern_that_shows_everything_changes_nothing(root, family, options):
    dense, model = burnish.load(tiny.folder(root, family)), sparse(tiny.folder(root, family), options)
    with torch.no_grad():
        want, got = (forward(each, {"input_ids": ids()}) for each in (dense, model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_prefix_is_seen_from_anywhere(tmp_path):
    folder = tiny.write(tmp_path, tiny.reference("llama", num_hidden_layers=1))
    options = {"pattern": "window", "sliding_window": 1}
    model = sparse(folder, options, {"prefix_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 8}})
    prefix = chain.hooks(model, "initial_cache")[0]({"input_ids": ids(1)})
    x = model.net.embed(ids(1)).detach().requires_grad_()
    prefix.values.retain_grad()
    states = model.net(inputs_embeds=x, prefix=prefix)
    assert torch.equal(reached(states, x), torch.eye(LENGTH, dtype=torch.bool))
    states[0, -1].sum().backward()
    assert (prefix.values.grad.abs().sum((0, 1, 2, 4)) > 0).all()


def test_a_shared_soft_prompt_obeys_the_pattern(root):
    model = sparse(tiny.folder(root, "llama"), WINDOW, {"prompt_tuning": {"num_virtual_tokens": 5}})
    texts = ["the cat", "where is the big red dog ?", "who sees"]
    settings = GenerationConfig(max_new_tokens=8, min_new_tokens=8)
    together = generate(model, texts, settings)
    assert [generate(model, [text], settings)[0].ids for text in texts] == [done.ids for done in together]
    slots = torch.tensor([[0, 1, 2, 3, 4, -1, -1]]).expand(3, -1)
    batch = {"input_ids": ids(3, 7), "slots": slots}
    with torch.no_grad():
        got = forward(model, batch)
        want = torch.cat([forward(model, {name: x[i : i + 1] for name, x in batch.items()}) for i in range(3)])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_it_is_saved_beside_lora_and_stays_when_lora_is_merged(root, tmp_path):
    model = sparse(tiny.folder(root, "llama"), BLOCKS, {"lora": {"r": 4}})
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape)
        want = forward(model, {"input_ids": ids()})
        again = burnish.load(save(model, tmp_path / "tuned"))
        assert torch.equal(forward(again, {"input_ids": ids()}), want)
    assert main(["merge", str(tmp_path / "tuned"), "--output-dir", str(tmp_path / "merged")]) == 0
    merged = burnish.load(tmp_path / "merged")
    assert [link.name for link in merged.chain] == ["sparse_attention"]
    with torch.no_grad():
        torch.testing.assert_close(forward(merged, {"input_ids": ids()}), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 0}, "sliding_window is 0; at least 1 is needed"),
        ({"block_size": 0}, "block_size is 0"),
        ({"window_blocks": 2}, "window_blocks is 2; an odd number is needed"),
        ({"random_blocks": -1}, "random_blocks is -1; at least 0"),
    ],
)
def test_sizes_that_make_no_sense(root, changes, reason):
    model = burnish.load(tiny.folder(root, "llama"))
    with pytest.raises(UserError, match=reason) as caught:
        apply(model, Config(**changes), Context())
    assert "\n" not in str(caught.value) and model.net.pattern is None
