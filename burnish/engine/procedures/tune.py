"""`burnish tune`: adapt a model to the user's data with a chain of techniques."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from burnish import chain, device
from burnish.config import UserError, from_mapping, to_mapping
from burnish.engine.progress import Terminal
from burnish.engine.settings import TrainConfig, check
from burnish.engine.train import train
from burnish.model.bundle import Context
from burnish.plan import check_memory
from burnish.store.checkpoint import load, save
from burnish.store.classes import labels_of, lookup, names_of, whole
from burnish.store.data import encode_classification, encode_rows
from burnish.store.hub import resolve
from burnish.store.rows import read_rows, require_column, split_rows
from burnish.store.sources import based_on, read_json
from burnish.store.take import LayersFrom, take
from burnish.store.tensors import write_json


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """A training run on a model and data. Classification is chosen by `label_column`, and then the chain starts with
    a new head unless it has one."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    techniques: list[Any] = field(
        default_factory=lambda: ["lora"], metadata={"help": "chain, as in '[nf4, {lora: {r: 8}}]'"}
    )
    data: str = field(default="", metadata={"help": "rows to train on: a file, a folder or a hub id"})
    eval_data: str = field(default="", metadata={"help": "rows to evaluate on"})
    eval_fraction: float = field(default=0.0, metadata={"help": "share of data split off to evaluate on"})
    columns: dict[str, str] = field(default_factory=dict, metadata={"help": "your names, as in '{prompt: question}'"})
    train_on: Literal["completion", "all"] = field(default="completion", metadata={"help": "which tokens carry loss"})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "one or two texts to classify"})
    label_column: str = field(default="", metadata={"help": "column with the class; makes it a classification"})
    layers_from: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "layers of another model to put in first, as in '{model: runs/a, layers: [4, 5], into: [4, 5]}'"
        },
    )
    dtype: str = field(default="", metadata={"help": "load as bf16, fp16 or fp32; empty: as stored"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})


def with_head(techniques: Sequence[Any], names: list[str]) -> list[Any]:
    """The chain with a new head for the classes: its own `transfer`, told their number and names, or one before it.

    Where its `label_names` are the classes' names, they take the order of `names`.
    """
    head = {"num_labels": len(names), "label_names": names}
    chained: list[dict[str, Any]] = [{item: None} if isinstance(item, str) else dict(item) for item in techniques]
    if not any("transfer" in item for item in chained):
        return [{"transfer": head}, *techniques]
    for item in chained:
        if "transfer" in item:
            given = head | (item["transfer"] or {})
            same = sorted(map(str, given["label_names"] or names)) == sorted(names)
            item["transfer"] = given | ({"label_names": names} if same else {})
    return chained


def class_order(techniques: Sequence[Any], labels: list[str]) -> list[str]:
    """What the data's sorted labels are looked up by, in the order of their classes: that of the chain's own
    `label_names`, else as they are sorted.

    Raises UserError where these names are not the labels, nor stand for numbers, and for a language-model head.
    """
    transfer = dict(chain.parse_chain(techniques)).get("transfer")
    if transfer is not None and transfer.head == "lm":
        raise UserError("label_column: it asks for a classifier, and transfer for head: lm; leave one of the two away")
    if transfer is None or not transfer.label_names:
        return labels
    given = transfer.label_names
    order = lookup(given, labels)
    lacking = sorted(set(given) - set(labels)) if not all(map(whole, labels)) else []
    if order is None or lacking or len(set(given)) < len(given):
        raise UserError(
            f"technique 'transfer': label_names {', '.join(given)} are not the data's labels, {', '.join(labels)}; "
            "write these, each once, in the order of their classes"
        )
    return order


def own_classes(folder: Path) -> list[str]:
    """The names of the classes of a model that has a classifier's head already, else none."""
    if folder.is_file():
        return []
    saved = read_json(folder / "burnish.json") if (folder / "burnish.json").exists() else {}
    adapter = folder / "adapter_config.json"
    base = read_json(adapter).get("base_model_name_or_path") if adapter.exists() else None
    if adapter.exists() or not saved.get("complete", True):
        folder = resolve(based_on(folder, {"base": base, **saved}))
    hf_config = read_json(folder / "config.json")
    transfer = {link["name"]: link["config"] for link in saved.get("chain", [])}.get("transfer", {})
    architecture = (hf_config.get("architectures") or [""])[0]
    if transfer.get("head") == "classification":  # of an adapter, whose base has none, and T5's, which no name tells
        return transfer.get("label_names") or names_of(hf_config)
    return names_of(hf_config) if architecture.endswith("ForSequenceClassification") else []


def run(config: TuneConfig) -> int:
    """Train; `output_dir` gets the checkpoints while it runs, the adapted model or adapter, and the resolved config."""
    if config.output_dir is None:
        raise UserError("output_dir: say where the result goes, as in --output-dir runs/mine")
    if not config.data:
        raise UserError("data: say what to train on, as in --data train.jsonl")
    rows, held = read_rows(config.data), []
    if config.eval_data:
        held = read_rows(config.eval_data)
    elif config.eval_fraction:
        rows, held = split_rows(rows, config.eval_fraction, config.seed)
    folder = resolve(config.model)
    techniques = list(config.techniques)
    names: list[str] = []
    if config.label_column:
        require_column(rows, config.label_column, config.data)
        labels = labels_of(rows, config.label_column) or [""]
        own = own_classes(folder) if "transfer" not in dict(chain.parse_chain(techniques)) else []
        kept = lookup(own, labels)
        names = kept or class_order(techniques, labels)
        techniques = techniques if kept else with_head(techniques, names)
        if kept:
            print(f"the model keeps its head for {', '.join(own)}; with transfer in techniques it gets a new one")
    elif config.text_columns:
        raise UserError("text_columns: they are classified; name the column of the class, as in --label-column label")
    chain.parse_chain(techniques)
    check_memory(
        folder,
        [techniques],
        config.per_device_train_batch_size,
        config.max_length,
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer_limit=config.optim_memory_limit if config.optim == "paged_adamw" else None,
    )

    dtype, place = device.parse_dtype(config.dtype or None), device.pick_device(config.device)
    model = load(config.model, dtype, place, techniques=techniques)
    if config.layers_from:
        taken = from_mapping(LayersFrom, config.layers_from, "layers_from")
        take(model, load(taken.model), taken)

    def encoded(part: list[dict[str, Any]], where: str) -> list[Any]:
        if names:
            texts, label = config.text_columns, config.label_column
            return encode_classification(part, model.tokenizer, texts, label, names, config.max_length, where)[0]
        columns, paired = config.columns or None, model.spec.paired
        return encode_rows(part, model.tokenizer, config.max_length, config.train_on, where, columns, paired=paired)

    examples, held_examples = encoded(rows, config.data), encoded(held, config.eval_data or config.data) if held else []
    torch.manual_seed(config.seed)
    chain.apply(model, techniques, Context(seed=config.seed, examples=examples))
    settings = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    training = from_mapping(TrainConfig, settings, "tune")
    check(model, examples, training, held_examples)
    count, total = sum(p.numel() for p in model.trainable().values()), model.parameter_count()
    print(f"{len(examples)} examples; {count:,} of {total:,} parameters train ({count / total:.2%})")
    result = train(model, examples, training, held_examples or None, Terminal())
    chain.finalize(model)
    save(model, config.output_dir)
    write_json(to_mapping(config), Path(config.output_dir) / "tune.json")
    summary = {"steps": result.steps, "seconds": round(result.seconds, 1), "losses": result.losses}
    summary |= {"eval_losses": result.eval_losses, "peak_memory_bytes": result.peak_memory}
    write_json(summary, Path(config.output_dir) / "training.json")
    last = f", evaluation loss {result.eval_losses[-1][1]:.4f}" if result.eval_losses else ""
    final = f"loss {result.losses[-1][1]:.4f}" if result.losses else json.dumps(result.losses)
    print(f"{result.steps} steps in {result.seconds:.0f} s, {final}{last}; saved to {config.output_dir}")
    return 0
