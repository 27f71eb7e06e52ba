"""Masks of burnish in models that transformers runs, against transformers with explicit masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_foreign
import torch
from torch import Tensor

import burnish
from burnish import chain
from burnish.chain import Model, forward
from burnish.config import UserError
from burnish.engine.generate import GenerationConfig, generate
from burnish.engine.loss import loss_sum
from burnish.engine.order import collated, packed
from burnish.model.example import Example
from burnish.store.checkpoint import save

LENGTH = 13
BLOCKS = {"block_size": 2, "global_blocks": 1, "window_blocks": 1, "random_blocks": 1, "seed": 3}
WINDOW = {"pattern": "window", "sliding_window": 3}
DECODERS = ("stablelm", "phi", "cohere", "gpt_bigcode", "mixtral", "cohere2", "phi3", "gpt_oss")
ENCODERS = ("roberta", "electra", "distilbert")


def ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(6, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def sparse(root: Path, family: str, options, *others) -> Model:
    return chain.apply(burnish.load(tiny_foreign.folder(root, family)), [{"sparse_attention": options}, *others])


def visible(model: Model, window: int = LENGTH, causal: bool | None = None) -> Tensor:
    """(LENGTH, LENGTH), by the model's pattern and a window of its own."""
    at, causal = [torch.tensor(i) for i in range(LENGTH)], model.spec.causal if causal is None else causal
    return torch.tensor(
        [
            [bool(model.net.pattern(i, j, causal)) and (not causal or j <= i) and abs(i - j) < window for j in at]
            for i in at
        ]
    )


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("options", [BLOCKS, WINDOW])
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_logits_equal_those_with_a_dense_mask(root, tmp_path, family, options):
    model, reference = sparse(root, family, options), tiny_foreign.reference(family)
    masks = {"full_attention": additive(visible(model)), "sliding_attention": additive(visible(model, 4))}
    mask = masks["sliding_attention" if family == "phi3" else "full_attention"]
    with torch.no_grad():
        got = model.net.logits(forward(model, {"input_ids": ids()}))
        want = reference(input_ids=ids(), attention_mask=masks if family in ("cohere2", "gpt_oss") else mask).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        assert not torch.allclose(want, reference(input_ids=ids()).logits, atol=1e-2)
        again = burnish.load(save(model, tmp_path / "saved"))
        assert torch.equal(again.net.logits(forward(again, {"input_ids": ids()})), got)


@pytest.mark.parametrize("options", [BLOCKS, WINDOW])
@pytest.mark.parametrize("family", DECODERS)
def test_token_by_token_gives_what_one_forward_gives(root, family, options):
    model = sparse(root, family, options)
    x, mask = ids(3), torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :5] = mask[1, :2] = False
    cache = model.net.new_cache(3, LENGTH)
    with torch.no_grad():
        whole = forward(model, {"input_ids": x, "attention_mask": mask})
        parts = [
            forward(model, {"input_ids": x[:, start:end], "attention_mask": mask[:, start:end]}, cache)
            for start, end in [(0, 6), *((i, i + 1) for i in range(6, LENGTH))]
        ]
        alone = forward(model, {"input_ids": x[:1, 5:]})
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[0, 5:], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("techniques", [[], [{"sparse_attention": BLOCKS}]])
@pytest.mark.parametrize("family", ["mixtral", "cohere2", "phi3", "gpt_oss"])
def test_documents_are_packed_where_the_model_has_windows(root, family, techniques):
    model = chain.apply(burnish.load(tiny_foreign.folder(root, family)), techniques)
    examples = [Example(ids(1, length)[0].tolist(), ids(1, length)[0].tolist()) for length in (9, 6, 7)]
    batch = packed(model, [examples], 24)
    with torch.no_grad():
        got = forward(model, batch)[0, :22]
        want = torch.cat([forward(model, collated(model, [example]))[0] for example in examples])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [BLOCKS, WINDOW])
@pytest.mark.parametrize("family", tiny_foreign.PAIRS)
def test_both_sides_of_an_encoder_decoder(tmp_path, family, options):
    reference = tiny_foreign.reference(family, encoder_layers=1, decoder_layers=1)
    reference.save_pretrained(tmp_path)
    tiny_foreign.tiny.tokenizer("seq2seq").save_pretrained(tmp_path)
    model = chain.apply(burnish.load(tmp_path), [{"sparse_attention": options}])

    def reached(states: Tensor, given: Tensor) -> Tensor:
        """bool (T, S): on which given embeddings each state depends."""
        rows = [torch.autograd.grad(state.sum(), given, retain_graph=True)[0].abs().sum(2)[0] for state in states[0]]
        return torch.stack(rows) > 0

    source, target = (model.net.embed(ids(1)).detach().requires_grad_() for _ in range(2))
    read = model.net.read(source, None, False).states
    states = model.net(inputs_embeds=target, source_embeds=source)
    assert torch.equal(reached(read, source), visible(model))
    assert torch.equal(reached(states, target), visible(model, causal=True))
    assert reached(states, source).all()  # attention to the source is whole


@pytest.mark.parametrize("family", ["stablelm", "cohere2", "gpt_oss", "roberta"])
def test_training_reaches_what_it_should_and_checkpointing_changes_nothing(root, family):
    model = sparse(root, family, WINDOW, {"lora": {"r": 4}})
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids(), "labels": ids(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.bool)}

    def gradients(checkpointing: bool) -> Tensor:
        model.net.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        model.net.train().zero_grad()
        loss_sum(model, batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.trainable().values()])

    want = gradients(False)
    assert (want != 0).float().mean() > 0.9
    torch.testing.assert_close(gradients(True), want)
    model.net.compute_dtype = torch.bfloat16
    assert (gradients(False) - want).norm() < 0.2 * want.norm()


def test_the_model_is_left_as_it_was(root):
    model = sparse(root, "stablelm", WINDOW)
    config = model.net.hf.config
    before = config.to_dict(), config._attn_implementation
    settings = GenerationConfig(max_new_tokens=6, min_new_tokens=6)
    assert len(generate(model, ["the cat", "who sees ?"], settings)) == 2
    assert (config.to_dict(), config._attn_implementation) == before == (before[0], "sdpa")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gptj", "a gptj model, run by transformers, does not take its attention from transformers' registry"),
        ("mamba", "a mamba model, run by transformers, does not take its attention"),
    ],
)
def test_what_is_refused(root, family, reason):
    with pytest.raises(UserError, match=reason) as caught:
        sparse(root, family, WINDOW)
    assert "\n" not in str(caught.value)


def test_a_model_that_also_mixes_tokens_elsewhere_is_refused_when_it_runs(root):
    model = burnish.load(tiny_foreign.folder(root, "falcon_h1"))
    examples = [Example(ids(1, 5)[0].tolist(), ids(1, 5)[0].tolist())] * 2
    with pytest.raises(UserError, match="does not keep packed documents apart"):
        forward(model, packed(model, [examples], 12))
    with pytest.raises(UserError, match="mixes tokens in a way that takes no mask"):
        forward(chain.apply(model, [{"sparse_attention": WINDOW}]), {"input_ids": ids()})
