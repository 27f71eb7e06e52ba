"""P-tuning v2 against transformers: its own models with our learnt keys and values in their cache."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

import burnish
from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.config import UserError
from burnish.engine.order import collated
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import IGNORE, Example
from burnish.store.checkpoint import load, save

TEXTS = ([3, 6, 7, 8, 9, 4], [3, 20, 21, 4])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def disturb(model: Model) -> Model:
    for parameter in model.trainable().values():
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6))
    return model


def classified() -> list[Example]:
    return [Example(list(ids), [IGNORE] * len(ids), label=label) for label, ids in enumerate(TEXTS)]


@torch.no_grad()
def classes(model: Model, examples: list[Example]) -> torch.Tensor:
    batch = collated(model, examples)
    return model.net.logits(model.net.pool(forward(model, batch), batch["attention_mask"]))


def cache(table: torch.Tensor, layers: int, heads: int, rows: int) -> transformers.DynamicCache:
    """The table (P, layers * 2 * heads * size), layer by layer its keys and then its values, in a cache."""
    past = transformers.DynamicCache()
    for layer, part in enumerate(table.chunk(layers, dim=1)):
        keys, values = (half.unflatten(1, (heads, -1)).transpose(0, 1).expand(rows, -1, -1, -1)
                        for half in part.chunk(2, dim=1))  # fmt: skip
        past.update(keys, values, layer)
    return past


@pytest.mark.parametrize("head", ["masked_lm", "classification"])
@pytest.mark.parametrize("projection", [False, True])
def test_berts_prompts_are_keys_and_values_in_every_layer(root, head, projection):
    options = {"num_virtual_tokens": 5, "prefix_projection": projection, "encoder_hidden_size": 16}
    model = disturb(chain.apply(load(tiny.folder(root, "bert", head)), {"p_tuning_v2": options}, Context(seed=1)))
    batch = collated(model, classified())
    with torch.no_grad():
        table = model.net.techniques["p_tuning_v2"]()
        mask = torch.cat((torch.ones(2, 5), batch["attention_mask"]), dim=1)
        theirs = tiny.reference("bert", head)
        body = theirs.bert(input_ids=batch["input_ids"], attention_mask=mask, past_key_values=cache(table, 2, 4, 2))
        if head == "classification":
            torch.testing.assert_close(classes(model, classified()), theirs.classifier(body.pooler_output), **CLOSE)
        hidden = body.last_hidden_state[batch["attention_mask"]]
        torch.testing.assert_close(forward(model, batch)[batch["attention_mask"]], hidden, **CLOSE)


def test_t5_gets_prompts_in_its_encoder_and_its_decoder(root):
    """transformers' encoder takes no cache: there they replace the keys and values of three more tokens."""
    model = disturb(chain.apply(load(tiny.folder(root, "t5")), {"p_tuning_v2": {"num_virtual_tokens": 3}}))
    batch = collated(model, [Example([6, 7, 8, 9, 10, 1], [IGNORE] * 3 + [9, 10, 1])])
    theirs = tiny.reference("t5")
    with torch.no_grad():
        encoder, decoder = model.net.techniques["p_tuning_v2"]().chunk(2, dim=1)  # of two layers each
        for block, part in zip(theirs.encoder.block, encoder.chunk(2, dim=1), strict=True):
            attention = block.layer[0].SelfAttention
            for projection, rows in zip((attention.k, attention.v), part.chunk(2, dim=1), strict=True):
                projection.register_forward_hook(
                    lambda module, inputs, out, rows=rows: torch.cat((rows[None], out[:, 3:]), dim=1)
                )
        ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), batch["source_input_ids"]), dim=1)
        source = theirs.encoder(input_ids=ids)[0][:, 3:]
        past = transformers.EncoderDecoderCache(cache(decoder, 2, 4, 1), transformers.DynamicCache())
        want = theirs(encoder_outputs=(source,), decoder_input_ids=batch["input_ids"], past_key_values=past).logits
        torch.testing.assert_close(model.net.logits(forward(model, batch)), want, **CLOSE)


@pytest.mark.parametrize(("family", "finalize"), [("bert", True), ("llama", False), ("t5", False), ("gpt2", True)])
def test_a_head_and_prompts_train_together(root, tmp_path, family, finalize):
    """The paper's classifier: a head on the frozen model, and prompts in every layer (section 3.3)."""
    prompts = {"p_tuning_v2": {"num_virtual_tokens": 4, "prefix_projection": finalize}}
    model = chain.apply(load(tiny.folder(root, family), techniques=["transfer"]), ["transfer", prompts])
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    assert {name.split(".")[0] for name in before} == {"score", "techniques"} | (
        {"pooler"} - {family} if family != "llama" and family != "gpt2" else set()
    )
    losses = train(model, classified(), TrainConfig(learning_rate=1e-2, max_steps=12, logging_steps=1)).losses
    assert losses[-1][1] < losses[0][1]
    assert all(not torch.equal(p, before[name]) for name, p in model.trainable().items())
    want = classes(model, classified())
    if finalize:
        chain.finalize(model)
        assert model.net.techniques["p_tuning_v2"].mlp is None
    again = burnish.load(save(model, tmp_path))
    torch.testing.assert_close(classes(again, classified()), want, **CLOSE)


def test_prefix_tuning_names_it_for_encoders(root):
    with pytest.raises(UserError, match="bert encoder keeps no key-value cache to put a prefix into; use p_tuning_v2"):
        chain.apply(load(tiny.folder(root, "bert")), "prefix_tuning")
