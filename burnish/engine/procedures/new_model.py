"""A model from nothing: random weights, layers of another model, or no counts yet, and a tokenizer."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from burnish.config import UserError, from_mapping
from burnish.model.bundle import Model
from burnish.model.families import read_spec
from burnish.model.ngram import NGram
from burnish.model.transformer import Transformer
from burnish.store.checkpoint import load
from burnish.store.hub import resolve
from burnish.store.sources import read_json
from burnish.store.take import LayersFrom, take
from burnish.store.tokenizer import load_tokenizer, train_encoder_tokenizer, train_tokenizer

TOKENIZER_ROWS = 40_000
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # the families' words for it


def new_model(
    hf_config: dict[str, Any],
    rows: list[dict[str, Any]],
    seed: int,
    layers_from: dict[str, Any] | None = None,
    tokenizer_of: str = "",
) -> Model:
    """A random network of the given config, or one without counts yet, with a tokenizer trained on the rows, or that of
    the model `tokenizer_of`, whose vocabulary's size then is the default.

    With `layers_from` it begins as those layers of another model do, the config is that model's but for what is given,
    and so is the tokenizer where its embeddings are taken.
    """
    source, taken = None, None
    if layers_from:
        taken = from_mapping(LayersFrom, layers_from, "layers_from")
        source = load(taken.model)
        hf_config = {**resized(source.hf_config, taken), **hf_config}
    if tokenizer_of:
        hf_config = {"vocab_size": read_json(resolve(tokenizer_of) / "config.json").get("vocab_size"), **hf_config}
    if "vocab_size" not in hf_config:
        raise UserError("model: vocab_size is missing; it sizes the tokenizer and the embedding")
    spec = read_spec(hf_config)
    if spec.paired:
        raise UserError("model: pretraining starts decoders and encoders; an encoder-decoder can be tuned")
    if spec.kind == "encoder" and spec.head != "masked_lm":
        raise UserError("model: an encoder is pretrained with a masked language model's head, such as BertForMaskedLM")
    if source is not None and taken is not None and taken.embeddings:
        tokenizer = source.tokenizer
    elif tokenizer_of:
        tokenizer = load_tokenizer(resolve(tokenizer_of))
    else:
        texts = (text for row in itertools.islice(rows, TOKENIZER_ROWS) for text in texts_of(row))
        made = train_encoder_tokenizer if spec.kind == "encoder" else train_tokenizer
        tokenizer = made(texts, spec.vocab_size)
    if len(tokenizer) > spec.vocab_size:
        raise UserError(f"model: vocab_size {spec.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens")
    config = {**hf_config, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config |= {"bos_token_id": tokenizer.bos_token_id}
    if spec.family == "ngram":
        return Model(NGram(spec, [0] * spec.hidden_size), tokenizer, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(Transformer(spec).initialize(), tokenizer, config)
    return model if source is None or taken is None else take(model, source, taken)


def resized(hf_config: dict[str, Any], taken: LayersFrom) -> dict[str, Any]:
    """The config of a model with the taken layers alone, unless they are put among others."""
    sizes: dict[str, Any] = {name: len(taken.layers) for name in DEPTHS if name in hf_config and taken.into is None}
    kinds = hf_config.get("layer_types")
    if sizes and kinds:
        sizes["layer_types"] = [kinds[number] for number in taken.layers if number < len(kinds)]
    return {**hf_config, **sizes}


def texts_of(row: dict[str, Any]) -> list[str]:
    """Every text of a row, chat turns included."""
    found = []
    for value in row.values():
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            found += [turn["content"] for turn in value if isinstance(turn, dict) and "content" in turn]
    return found
