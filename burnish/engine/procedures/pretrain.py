"""`burnish pretrain`: a new model from nothing, tokenizer included."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from burnish import chain
from burnish.config import UserError, from_mapping, nearest, to_mapping
from burnish.engine.procedures.new_model import new_model, texts_of
from burnish.engine.progress import Terminal
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.bundle import Model
from burnish.model.ngram import NGram, count
from burnish.store.checkpoint import save
from burnish.store.data import encode_rows
from burnish.store.rows import read_rows
from burnish.store.tensors import write_json

NGRAM = {"order": 5, "architectures": ["NGramForCausalLM"]}
NGRAM_VOCABULARY = 4096
FULL_STOP = re.compile(r"(?<=\.)\s+(?=\S)")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """A training run, and the model that it starts: `model` is the new model's config.json as a mapping, or "ngram" for
    an n-gram model, which counts instead of training."""

    positional: ClassVar[str] = "data"
    data: str = field(default="world", metadata={"help": "a file or hub id of text, or 'world', the embedded corpus"})
    model: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": "the new model's config.json, or ngram"}
    )
    layers_from: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "layers of another model to start from, as in '{model: runs/big, layers: [0, 2, 4]}'"},
    )
    tokenizer: str = field(default="", metadata={"help": "a model whose tokenizer is taken; empty: a new one is made"})
    documents: int = field(default=0, metadata={"help": "documents taken from the data; 0: all (needed for 'world')"})
    parts: list[str] = field(
        default_factory=list, metadata={"help": "parts of the embedded corpus, as in 'facts,biographies'; empty: all"}
    )
    sentences: bool = field(default=False, metadata={"help": "every sentence that ends in a full stop is its own row"})
    packing: bool = field(default=True, metadata={"help": "several documents in one row; they do not see each other"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the tokens that an encoder is to tell"})
    bf16: bool = field(default=True, metadata={"help": "compute in bfloat16 (in float32 on a CPU without it)"})


def rows_of(config: PretrainConfig) -> list[dict[str, Any]]:
    """The rows to train on. Raises UserError for an endless corpus without a number of documents."""
    if config.data != "world":
        rows: Iterable[dict[str, Any]] = read_rows(config.data)
    else:
        from burnish.world.corpus import MIXTURE, tagged_documents

        if config.documents < 1:
            raise UserError("documents: the embedded corpus is endless; say how many documents to take")
        for part in config.parts:
            if part not in MIXTURE:
                raise UserError(f"parts: the corpus has no part '{part}'{nearest(part, MIXTURE)}: {', '.join(MIXTURE)}")
        kept = config.parts or MIXTURE
        rows = (document for part, document in tagged_documents(config.seed) if part in kept)
    return list(itertools.islice(rows, config.documents or None))


def run(config: PretrainConfig) -> int:
    """Train, and save the model in bfloat16 in Hugging Face's format into `output_dir`."""
    import torch

    if config.output_dir is None:
        raise UserError("output_dir: pretraining needs a folder for its checkpoints and the model")
    rows = rows_of(config)
    hf_config = config.model
    if isinstance(hf_config, str):
        size = {} if config.tokenizer else {"vocab_size": NGRAM_VOCABULARY}
        hf_config = {"model_type": hf_config, **size, **NGRAM}
    model = new_model(hf_config, rows, config.seed, config.layers_from, config.tokenizer)
    causal = model.spec.causal
    if not causal:  # an encoder has no turns
        rows = [{"text": "\n".join(texts_of(row))} for row in rows]
    if config.sentences:
        rows = [{"text": part} for row in rows for text in texts_of(row) for part in FULL_STOP.split(text)]
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}  # a corpus may mix texts and conversations
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    examples = [
        example
        for kind in kinds.values()
        for example in encode_rows(kind, model.tokenizer, config.max_length, train_on="all", where=config.data)
    ]
    if isinstance(model.net, NGram):
        model.net = count(model.spec, (example.ids for example in examples))
        model.hf_config["entries"] = [len(keys) for keys in model.net.keys]
        return saved(model, config, f"{sum(model.hf_config['entries'])} n-grams")
    chain.apply(model, ["full"])
    options = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    options["mlm_probability"] = 0.0 if causal else config.mlm_probability
    result = train(model, examples, from_mapping(TrainConfig, options, "pretrain"), progress=Terminal())
    model.net.to(torch.bfloat16)
    model.chain.clear()  # a pretrained model is a base: nothing was applied to it
    return saved(model, config, f"{result.steps} steps, {result.tokens} tokens, {result.seconds:.0f} s")


def saved(model: Model, config: PretrainConfig, said: str) -> int:
    """Save the model with the settings that made it, and say so; 0."""
    folder = save(model, config.output_dir or Path())
    write_json(to_mapping(config), folder / "pretrain.json")
    print(f"{said}; saved to {folder}")
    return 0
