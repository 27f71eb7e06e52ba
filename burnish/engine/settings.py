"""The settings of a training run, and what is wrong with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from burnish.chain import Model
from burnish.config import Bytes, UserError
from burnish.engine.optim import Schedule
from burnish.engine.paging import SMALLEST_LIMIT
from burnish.model.example import IGNORE, Example

log = logging.getLogger(__name__)


def _field(default: Any, text: str, output_only: bool = False) -> Any:
    return field(default=default, metadata={"help": text, "output_only": output_only})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run, under Hugging Face's names. `output_only` ones may change when a run is resumed."""

    output_dir: Path | None = _field(
        None, "folder of checkpoints and of the result; none, from Python alone, writes nothing", True
    )
    overwrite: bool = _field(False, "delete the checkpoints in output_dir and start anew", True)
    learning_rate: float = _field(5e-5, "peak learning rate")
    per_device_train_batch_size: int = _field(8, "rows per micro-batch")
    gradient_accumulation_steps: int = _field(1, "micro-batches per step")
    num_train_epochs: float = _field(3.0, "passes over the data")
    max_steps: int = _field(-1, "steps; if positive, replaces num_train_epochs")
    warmup_steps: int = _field(0, "steps of rising learning rate")
    warmup_ratio: float = _field(0.0, "the same as a share of all steps, if warmup_steps is 0")
    lr_scheduler_type: Schedule = _field("linear", "course of the learning rate after the warmup")
    weight_decay: float = _field(0.0, "decoupled weight decay of matrices")
    optim: Literal["adamw", "paged_adamw"] = _field("adamw", "paged_adamw keeps AdamW's moments out of memory", True)
    optim_memory_limit: Bytes = _field(Bytes(64_000_000), "bytes of paged_adamw's moments in memory at a time", True)
    adam_beta1: float = _field(0.9, "decay of AdamW's first moment")
    adam_beta2: float = _field(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _field(1.0, "gradients are clipped to this global norm; 0: not clipped")
    max_length: int = _field(1024, "tokens per row when packing")
    packing: bool = _field(False, "put several examples in one row; they do not see each other")
    mlm_probability: float = _field(0.0, "share of the tokens that a masked language model is to tell; 0: as labelled")
    bf16: bool = _field(False, "compute in bfloat16 (in float32 on a CPU without it)")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward pass: less memory, slower")
    compile: bool = _field(False, "compile the layers with torch.compile")
    eval_steps: int = _field(0, "steps between evaluations; 0: only at the end")
    early_stopping_patience: int = _field(0, "stop after so many evaluations without improvement; 0: never")
    load_best_model_at_end: bool = _field(False, "end with the parameters of the best evaluation")
    save_steps: int = _field(500, "steps between checkpoints; 0: only at the end", True)
    save_total_limit: int | None = _field(None, "checkpoints kept; none keeps all", True)
    logging_steps: int = _field(10, "steps between logged losses", True)
    report_to: Literal["none", "tensorboard"] = _field("none", "where losses go besides the result", True)
    seed: int = _field(42, "seed of the data order and of dropout")


def check(
    model: Model, examples: Sequence[Example], config: TrainConfig, eval_examples: Sequence[Example] | None
) -> None:
    """Raise UserError for what cannot train."""
    if model.spec.head == "none":
        raise UserError(
            f"model: this {model.spec.family} {model.spec.kind} has no head, so it answers nothing; put one on in "
            "techniques, {transfer: {head: lm}}, or classify rows, as in --text-columns text --label-column label"
        )
    if not model.trainable():
        raise UserError("techniques: no parameter trains; put one that trains in the chain, such as lora or full")
    if not examples:
        raise UserError("training data: there is no example")
    classes = model.spec.num_labels if model.spec.head == "classification" else 0
    for index, example in enumerate(examples):
        if example.label is None and classes:
            raise UserError(f"training data: example {index + 1} has no class, and the model classifies")
        if example.label is not None and not 0 <= example.label < classes:
            knows = f"classes 0 to {classes - 1}" if classes else "no classes: it predicts tokens"
            raise UserError(f"training data: example {index + 1} has class {example.label}, the model {knows}")
    if not any(map(_has_target, examples)):
        raise UserError("training data: every label of every example is masked (-100), so nothing can be learnt")
    if config.packing and classes:
        raise UserError("classified examples cannot be packed, as a row has one class; set packing: false")
    if config.packing and model.spec.paired:
        raise UserError("packing: an encoder-decoder's rows are not packed; set packing: false")
    if config.mlm_probability:
        if model.spec.head != "masked_lm" or getattr(model.tokenizer, "mask_token_id", None) is None:
            raise UserError("mlm_probability: only a masked language model with a mask token is trained so; leave it 0")
        if not 0 < config.mlm_probability < 1:
            raise UserError(f"mlm_probability: a share between 0 and 1 is needed, not {config.mlm_probability}")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, is {getattr(config, name)}")
    for name in ("learning_rate", "weight_decay", "warmup_steps"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name}: must be 0 or more, is {getattr(config, name)}")
    if not 0 <= config.warmup_ratio <= 1:
        raise UserError(f"warmup_ratio: a share of the steps is needed, 0 to 1, not {config.warmup_ratio}")
    if config.optim_memory_limit < SMALLEST_LIMIT:
        raise UserError(
            f"optim_memory_limit: is {config.optim_memory_limit} bytes, and the smallest pages take {SMALLEST_LIMIT}"
        )
    if config.max_steps <= 0 and config.num_train_epochs <= 0:
        raise UserError("num_train_epochs: must be above 0, or set max_steps")
    if not eval_examples and (config.early_stopping_patience or config.load_best_model_at_end):
        raise UserError("early_stopping_patience, load_best_model_at_end: there is no evaluation data to judge by")
    if config.report_to != "none" and config.output_dir is None:
        raise UserError("report_to: tensorboard writes below output_dir; set output_dir")


def warn(examples: Sequence[Example]) -> None:
    """Warn of what trains badly."""
    empty = sum(not _has_target(example) for example in examples)
    if empty:
        log.warning(
            "%d of %d training examples have no target: all their labels are masked (-100)", empty, len(examples)
        )


def _has_target(example: Example) -> bool:
    return example.label is not None or any(label != IGNORE for label in example.labels[1:])
