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
from burnish.engine.progress import Terminal
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.bundle import Model
from burnish.model.families import read_spec
from burnish.model.transformer import Transformer
from burnish.store.checkpoint import save
from burnish.store.data import encode_rows
from burnish.store.rows import read_rows
from burnish.store.tensors import write_json
from burnish.store.tokenizer import train_encoder_tokenizer, train_tokenizer

TOKENIZER_ROWS = 40_000
FULL_STOP = re.compile(r"(?<=\.)\s+(?=\S)")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """A training run, and the model that it starts: `model` is the new model's config.json as a mapping."""

    positional: ClassVar[str] = "data"
    data: str = field(default="world", metadata={"help": "a file or hub id of text, or 'world', the embedded corpus"})
    model: dict[str, Any] = field(default_factory=dict, metadata={"help": "the new model's config.json"})
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


def new_model(hf_config: dict[str, Any], rows: list[dict[str, Any]], seed: int) -> Model:
    """A random network of the given config with a tokenizer trained on the rows."""
    if "vocab_size" not in hf_config:
        raise UserError("model: vocab_size is missing; it sizes the tokenizer and the embedding")
    import torch

    spec = read_spec(hf_config)
    if spec.paired:
        raise UserError("model: pretraining starts decoders and encoders; an encoder-decoder can be tuned")
    if spec.kind == "encoder" and spec.head != "masked_lm":
        raise UserError("model: an encoder is pretrained with a masked language model's head, such as BertForMaskedLM")
    texts = (text for row in itertools.islice(rows, TOKENIZER_ROWS) for text in texts_of(row))
    train = train_encoder_tokenizer if spec.kind == "encoder" else train_tokenizer
    tokenizer = train(texts, int(hf_config["vocab_size"]))
    config = {**hf_config, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config |= {"bos_token_id": tokenizer.bos_token_id}
    if len(tokenizer) > spec.vocab_size:
        raise UserError(f"model: vocab_size {spec.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(Transformer(spec).initialize(), tokenizer, config)


def texts_of(row: dict[str, Any]) -> list[str]:
    """Every text of a row, chat turns included."""
    found = []
    for value in row.values():
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            found += [turn["content"] for turn in value if isinstance(turn, dict) and "content" in turn]
    return found


def run(config: PretrainConfig) -> int:
    """Train, and save the model in bfloat16 in Hugging Face's format into `output_dir`."""
    import torch

    if config.output_dir is None:
        raise UserError("output_dir: pretraining needs a folder for its checkpoints and the model")
    rows = rows_of(config)
    model = new_model(config.model, rows, config.seed)
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
    chain.apply(model, ["full"])
    options = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    options["mlm_probability"] = 0.0 if causal else config.mlm_probability
    result = train(model, examples, from_mapping(TrainConfig, options, "pretrain"), progress=Terminal())
    model.net.to(torch.bfloat16)
    model.chain.clear()  # a pretrained model is a base: nothing was applied to it
    save(model, Path(config.output_dir))
    write_json(to_mapping(config), Path(config.output_dir) / "pretrain.json")
    print(f"{result.steps} steps, {result.tokens} tokens, {result.seconds:.0f} s; saved to {config.output_dir}")
    return 0
