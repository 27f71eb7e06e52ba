"""The training loop.

It knows no technique: what a technique adds comes through the hooks of `burnish.chain`. One step takes
`gradient_accumulation_steps` micro-batches, sums their losses and gradients over every target, and divides by
the number of targets of the whole group, so that a step is the same however it is split. The order of the
data is a function of (seed, epoch), the learning rate of the step: with the tensors and the random state, a
checkpoint needs only counters to go on exactly.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from burnish import chain, device
from burnish.chain import Model
from burnish.config import UserError, to_mapping
from burnish.engine import checkpointing
from burnish.engine.checkpointing import Progressed
from burnish.engine.loss import distillation_sum, evaluate, loss_sum
from burnish.engine.masking import clozes, masked
from burnish.engine.optim import adamw, gradient_norm, lr_factor, parameter_groups, scale_gradients
from burnish.engine.order import Order, encode
from burnish.engine.paging import PagedAdamW
from burnish.engine.progress import Board, Progress
from burnish.engine.settings import TrainConfig, check, warn
from burnish.kernels.training import fused
from burnish.model.example import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run did, since its first start. Losses are (step, mean per target) of a logging window or evaluation.

    `seconds` is the time of the steps, without evaluation and checkpoints; `tokens` leaves out padding;
    `peak_memory` is in bytes.
    """

    steps: int
    losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]
    seconds: float
    tokens: int
    peak_memory: int


def train(
    model: Model,
    examples: Sequence[Example],
    config: TrainConfig,
    eval_examples: Sequence[Example] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train the model's trainable parameters in place.

    A run with an `output_dir` writes checkpoints and goes on from the newest one there; SIGINT and SIGTERM
    end it with a checkpoint and KeyboardInterrupt. Raises UserError for settings or data that cannot train,
    for an `output_dir` that holds another run, and when the loss is no longer finite.
    """
    check(model, examples, config, eval_examples)
    warn(examples)
    model.whole = False  # its weights are no stored checkpoint's any more
    device.seed_everything(config.seed)
    device.return_freed_memory()  # what loading and quantising took
    if config.gradient_checkpointing:  # else each layer's temporaries leave a hole below what the next layer keeps
        device.return_large_blocks()
    device.reset_peak_memory(model.device)
    with _masters(model), _training_mode(model, config):
        run = _Run(model, examples, config, eval_examples, progress)
        with checkpointing.interrupts(config.output_dir is not None) as interrupted:
            run.loop(interrupted)
    done = run.done
    return TrainResult(
        done.step, done.losses, done.eval_losses, done.seconds, done.tokens, device.peak_memory(model.device)
    )


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        config: TrainConfig,
        eval_examples: Sequence[Example] | None,
        progress: Progress | None,
    ):
        self.model = model
        self.config = config
        self.progress = progress
        examples, self.eval_examples = encode(model, examples), encode(model, eval_examples or [])
        if config.mlm_probability:  # the same tokens at every evaluation
            share = config.mlm_probability
            self.eval_examples = masked(self.eval_examples, model.tokenizer, share, config.seed, epoch=-1)
        else:
            examples, self.eval_examples = clozes(model, examples), clozes(model, self.eval_examples)
        self.order = Order(model, examples, config)
        self.parameters = model.trainable()
        steps_per_epoch = len(self.order.epoch(0))
        self.total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
        self.warmup = config.warmup_steps or math.ceil(config.warmup_ratio * self.total)
        losses = chain.hooks(model, "loss")
        teachers = [hook for hook in chain.hooks(model, "teacher") if hook() is not None]
        if len(losses) + len(teachers) > 1:
            raise UserError("techniques: two of the chain replace the training loss; keep one of them")
        self.loss = lambda batch: losses[0](batch, chain.forward(model, batch)) if losses else loss_sum(model, batch)
        if teachers:
            self.loss = lambda batch: distillation_sum(model, batch, teachers[0]())
        own = [
            group
            for hook in chain.hooks(model, "parameter_groups")
            for group in hook(config.learning_rate, config.weight_decay)
        ]
        groups = parameter_groups(self.parameters.values(), config.learning_rate, config.weight_decay, own)
        rates = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
        self.optimizer = adamw(groups, *rates)
        if config.optim == "paged_adamw":
            self.optimizer = PagedAdamW(groups, *rates, config.optim_memory_limit, config.output_dir)
        self.after_step = chain.hooks(model, "after_step")
        self.keeps_best = config.load_best_model_at_end or config.early_stopping_patience > 0
        self.best: dict[str, Tensor] = {}
        self.done = Progressed()
        self.fingerprint: dict[str, Any] = {}
        if config.output_dir is not None:
            self.fingerprint = self._fingerprint(examples, eval_examples)
            self._resume(config.output_dir)

    @property
    def finished(self) -> bool:
        patience = self.config.early_stopping_patience
        return self.done.step >= self.total or 0 < patience <= self.done.evaluations_since_best

    def loop(self, interrupted: Callable[[], bool]) -> None:
        """Steps until the end; keeps the last or the best parameters."""
        config, done = self.config, self.done
        board = None
        if config.report_to == "tensorboard" and config.output_dir is not None:
            board = Board(config.output_dir / "runs", done.step)
        began, first = time.perf_counter(), done.step
        while not self.finished:
            for group in self.order.epoch(done.epoch)[done.position :]:
                loss, lr, speed = self._step(group)
                if self.progress:
                    eta = (time.perf_counter() - began) / (done.step - first) * (self.total - done.step)
                    self.progress(done.step, self.total, loss, lr, speed, eta)
                self._evaluate(board)
                self._log(board, lr)
                stop = interrupted()
                if stop or self.finished or (config.save_steps and done.step % config.save_steps == 0):
                    saved = self._save()
                    if stop and not self.finished:
                        if saved:
                            at = f"step {done.step} of {self.total}"
                            log.warning("stopped at %s: the same command goes on from %s", at, saved)
                        raise KeyboardInterrupt
                if self.finished:
                    break
            else:
                done.epoch, done.position = done.epoch + 1, 0
        if board:
            board.close()
        if self.keeps_best and self.best:
            checkpointing.copy_into(self.parameters, self.best)

    def _step(self, group: list[list[Any]]) -> tuple[float, float, float]:
        """One optimiser step; returns (mean loss per target, learning rate, tokens per second)."""
        config, done = self.config, self.done
        began, tokens_before = time.perf_counter(), done.tokens
        factor = lr_factor(config.lr_scheduler_type, done.step, self.total, self.warmup)
        for settings in self.optimizer.param_groups:
            settings["lr"] = settings["initial_lr"] * factor
        loss, targets = torch.zeros((), dtype=torch.float64, device=self.model.device), 0
        for rows in group:
            batch = self.order.batch(rows)
            done.tokens += sum(int(mask.sum()) for name, mask in batch.items() if name.endswith("attention_mask"))
            part, count = self.loss({name: tensor.to(self.model.device) for name, tensor in batch.items()})
            part.backward()
            loss, targets = loss + part.detach(), targets + count
        parameters = self.parameters.values()
        total, norm = torch.stack([loss, gradient_norm(parameters).to(loss)]).tolist()
        done.step, done.position = done.step + 1, done.position + 1
        if not (math.isfinite(total) and math.isfinite(norm)):
            what = f"loss became {total}" if not math.isfinite(total) else f"gradient became {norm}"
            raise UserError(
                f"{what} at step {done.step}: lower learning_rate ({config.learning_rate}), or raise warmup_steps; "
                "earlier checkpoints are kept"
            )
        if targets:
            clip = config.max_grad_norm / (norm / targets + 1e-6) if config.max_grad_norm else 1.0
            scale_gradients(parameters, min(1.0, clip) / targets)
            self.optimizer.step()
        self.optimizer.zero_grad()
        for hook in self.after_step:
            hook(done.step, self.total)
        done.window_loss += total
        done.window_targets += targets
        spent = time.perf_counter() - began
        done.seconds += spent
        return total / max(1, targets), config.learning_rate * factor, (done.tokens - tokens_before) / spent

    def _log(self, board: Board | None, lr: float) -> None:
        done = self.done
        due = done.step % self.config.logging_steps == 0 or self.finished
        if due and done.window_targets:
            mean = done.window_loss / done.window_targets
            done.losses.append((done.step, mean))
            done.window_loss, done.window_targets = 0.0, 0
            if board:
                board(done.step, loss=mean, learning_rate=lr)

    def _evaluate(self, board: Board | None) -> None:
        config, done = self.config, self.done
        due = done.step == self.total or (config.eval_steps and done.step % config.eval_steps == 0)
        if not self.eval_examples or not due:
            return
        loss = evaluate(self.model, self.eval_examples, config.per_device_train_batch_size)
        done.eval_losses.append((done.step, loss))
        if board:
            board(done.step, eval_loss=loss)
        if self.keeps_best and done.evaluations_since_best == 0:
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def _fingerprint(self, examples: Sequence[Example], eval_examples: Sequence[Example] | None) -> dict[str, Any]:
        free = {f.name for f in fields(TrainConfig) if f.metadata["output_only"]}
        return {
            "model": {"identity": self.model.identity, **to_mapping(self.model.spec)},
            "techniques": {link["name"]: link["config"] for link in chain.describe(self.model)},
            "data": checkpointing.data_digest(examples),
            "eval_data": checkpointing.data_digest(eval_examples or []),
            "config": {name: value for name, value in to_mapping(self.config).items() if name not in free},
        }

    def _resume(self, folder: Path) -> None:
        found = checkpointing.start(folder, self.fingerprint, self.config.overwrite)
        if found is None:
            return
        path, state = found
        self.done = checkpointing.progressed_of(state)
        checkpointing.copy_into(
            checkpointing.changing_tensors(self.model.net), checkpointing.read(path, "trainable.safetensors")
        )
        moments = checkpointing.read(path, "optimizer.safetensors")
        checkpointing.restore_optimizer(self.optimizer, self.parameters, moments)
        if "best.safetensors" in state["files"]:
            self.best = checkpointing.read(path, "best.safetensors")
        checkpointing.set_random_state(state["random"], self.model.device)
        log.warning("going on from %s: step %d of %d", path, self.done.step, self.total)

    def _save(self) -> Path | None:
        """Write a checkpoint; one that cannot be written costs a warning, not the run. Returns its path."""
        if self.config.output_dir is None:
            return None
        files = {
            "trainable.safetensors": checkpointing.changing_tensors(self.model.net),
            "optimizer.safetensors": checkpointing.optimizer_tensors(self.optimizer, self.parameters),
        }
        if self.best:
            files["best.safetensors"] = self.best
        state = checkpointing.state_of(self.done, self.fingerprint, self.model.device)
        try:
            return checkpointing.save(self.config.output_dir, state, files, self.config.save_total_limit)
        except (OSError, SafetensorError) as error:
            log.warning("checkpoint of step %d not written (%s); earlier ones are kept", self.done.step, error)
            return None
        finally:
            if isinstance(self.optimizer, PagedAdamW):
                self.optimizer.give_back()


@contextmanager
def _masters(model: Model) -> Iterator[None]:
    """Train 16-bit parameters in float32, as small updates round away in them, and store them as they were after."""
    net, before = model.net, model.net.compute_dtype
    narrow = {name: p.dtype for name, p in model.trainable().items() if p.dtype in (torch.bfloat16, torch.float16)}
    net.compute_dtype = net.dtype
    for name in narrow:
        net.get_parameter(name).data = net.get_parameter(name).data.float()
    try:
        yield
    finally:
        for name, dtype in narrow.items():
            net.get_parameter(name).data = net.get_parameter(name).data.to(dtype)
        net.compute_dtype = before


@contextmanager
def _training_mode(model: Model, config: TrainConfig) -> Iterator[None]:
    net = model.net
    before = net.training, net.compute_dtype, net.gradient_checkpointing
    net.train()
    if config.bf16:
        slow = model.device.type == "cpu" and not device.multiplies_bfloat16()
        net.compute_dtype = torch.float32 if slow else torch.bfloat16
    net.gradient_checkpointing = config.gradient_checkpointing
    slower = device.compiler_line() if config.compile else None
    if slower:
        log.warning(slower)
    compiles = config.compile and not slower
    if compiles:
        for layer in net.all_layers:
            layer.compile()
    try:
        with fused(net):
            yield
    finally:
        net.zero_grad()
        net.train(before[0])
        net.compute_dtype, net.gradient_checkpointing = before[1:]
        if compiles:
            for layer in net.all_layers:
                layer._compiled_call_impl = None
