import io
import logging
import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import tiny_config, tiny_examples, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish import chain
from burnish.chain import Context, apply
from burnish.config import UserError
from burnish.engine import optim
from burnish.engine import train as train_module
from burnish.engine.loss import evaluate, loss_sum
from burnish.engine.order import Order
from burnish.engine.progress import Terminal, duration
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.store.batch import collate

one_step_of_all = tiny_config(per_device_train_batch_size=24, max_steps=1)


def plain_loss(model, examples):
    """Sum of next-token losses, one unpadded example at a time, and the number of targets."""
    total, count = 0.0, 0
    for example in examples:
        logits = model.net.logits(model.net(torch.tensor([example.ids])))[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total = total + F.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    return total, count


def parameters_after(config, examples=None, dtype=torch.float64, **options):
    model = tiny_model()
    model.net.to(dtype)
    result = train(model, examples or tiny_examples(), config, **options)
    return {name: p.detach().clone() for name, p in model.trainable().items()}, result


def assert_close(left, right, tolerance):
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def test_equals_a_plain_loop():
    from transformers import get_scheduler

    config = tiny_config(
        learning_rate=0.02, max_steps=6, warmup_steps=2, lr_scheduler_type="cosine", weight_decay=0.1, max_grad_norm=0.3
    )
    parameters, result = parameters_after(config)

    reference = tiny_model()
    reference.net.double()
    order, losses = Order(reference, tiny_examples(), config), []
    named = reference.trainable()
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02, foreach=False, fused=False)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6)
    for group in order.epoch(0)[:6]:
        total, count = plain_loss(reference, [example for rows in group for example in rows])
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.3)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append((total / count).item())
    assert [loss for _, loss in result.losses] == pytest.approx(losses, abs=1e-10)
    assert_close(parameters, {name: p.detach() for name, p in named.items()}, 1e-8)


@pytest.mark.parametrize("packing", [False, True])
def test_accumulation_equals_one_large_batch(packing):
    examples = tiny_examples(16)
    whole = tiny_config(per_device_train_batch_size=16, max_steps=3, packing=packing, max_length=16)
    split = replace(whole, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    expected, one = parameters_after(whole, examples)
    parameters, many = parameters_after(split, examples)
    assert_close(parameters, expected, 1e-9)
    assert [loss for _, loss in many.losses] == pytest.approx([loss for _, loss in one.losses], abs=1e-12)
    assert many.tokens == one.tokens == 3 * sum(len(example.ids) for example in examples)


def test_packing_changes_no_loss():
    _, padded = parameters_after(one_step_of_all)
    _, packed = parameters_after(replace(one_step_of_all, packing=True, max_length=40))
    total, count = plain_loss(tiny_model(), tiny_examples())
    assert padded.losses[0][1] == pytest.approx(packed.losses[0][1], abs=1e-10)
    assert padded.losses[0][1] == pytest.approx((total / count).item(), abs=1e-5)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_number():
    def rows(number, **changes):
        steps = Order(tiny_model(), tiny_examples(), tiny_config(**changes)).epoch(number)
        return [tuple(example.ids) for group in steps for micro in group for example in micro]

    assert sorted(rows(0)) == sorted(tuple(example.ids) for example in tiny_examples())
    assert rows(0) == rows(0)
    assert len({tuple(rows(0)), tuple(rows(1)), tuple(rows(0, seed=1))}) == 3


def test_epochs_decide_the_steps_and_losses_are_means_of_their_window():
    config = tiny_config(max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=5)
    _, each = parameters_after(config)
    assert each.steps == 5  # 12 micro-batches: groups of 5, 5 and 2, one and a half times
    _, windows = parameters_after(replace(config, logging_steps=2))
    assert [step for step, _ in windows.losses] == [2, 4, 5]
    assert windows.losses[-1] == each.losses[-1]


@pytest.mark.parametrize("techniques", ["full", {"lora": {"r": 8, "target_modules": "all-linear"}}])
def test_training_learns_and_leaves_frozen_parameters(techniques):
    model = tiny_model(techniques)
    frozen = {n: p.clone() for n, p in model.net.named_parameters() if not p.requires_grad}
    result = train(model, tiny_examples(6), tiny_config(max_steps=60, learning_rate=3e-2))
    assert result.losses[-1][1] < 0.5 * result.losses[0][1]
    assert all(torch.equal(p, frozen[n]) for n, p in model.net.named_parameters() if n in frozen)
    assert all(p.grad is None for p in model.net.parameters())


@pytest.mark.parametrize(
    ("settings", "multiplies_bfloat16", "dtype", "tolerance"),
    [
        ({"gradient_checkpointing": True}, True, torch.float32, 1e-6),
        ({"bf16": True}, True, torch.bfloat16, 0.05),
        ({"bf16": True}, False, torch.float32, 1e-6),
    ],
)
def test_cheaper_modes_change_little_and_are_undone(settings, multiplies_bfloat16, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(train_module.device, "multiplies_bfloat16", lambda: multiplies_bfloat16)
    _, expected = parameters_after(tiny_config(), dtype=torch.float32)
    model, seen = tiny_model(), []
    result = train(model, tiny_examples(), tiny_config(**settings), progress=lambda *_: seen.append(model.net.dtype))
    assert set(seen) == {dtype}
    assert all(p.dtype == torch.float32 for p in model.net.parameters())
    assert model.net.compute_dtype is None and not model.net.gradient_checkpointing
    assert [loss for _, loss in result.losses] == pytest.approx([x for _, x in expected.losses], rel=tolerance)


def test_compile_covers_the_layers_for_the_run(monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compiled.append(layer))
    monkeypatch.setattr(train_module.device, "compiler_line", lambda: None)
    model = tiny_model()
    train(model, tiny_examples(), tiny_config(max_steps=1, compile=True))
    assert compiled == list(model.net.layers)
    monkeypatch.setattr(train_module.device, "compiler_line", lambda: "no C++ compiler found")
    with caplog.at_level(logging.WARNING):
        train(model, tiny_examples(), tiny_config(max_steps=1, compile=True))
    assert len(compiled) == 2 and "no C++ compiler found" in caplog.text


def encoder(head, **changes):
    return tiny_model(kind="encoder", family="bert", head=head, positions="learned", norm="layer", **changes)


def test_a_masked_language_model_is_not_shifted():
    model = encoder("masked_lm", head_bias=True)
    examples = [Example([5, 6, 7, 8], [-100, 9, -100, -100]), Example([1, 2, 3], [-100, -100, 4])]
    loss, count = loss_sum(model, collate(examples, 0))
    parts = [(torch.tensor([e.ids]), i, e.labels[i]) for e, i in zip(examples, (1, 2), strict=True)]
    expected = sum(F.cross_entropy(model.net.logits(model.net(ids))[0, i], torch.tensor(y)) for ids, i, y in parts)
    assert count == 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_class_is_learnt_from_the_pooled_state(kind):
    build = encoder if kind == "encoder" else tiny_model
    model = build(head="classification", num_labels=3)
    examples = [replace(e, labels=[-100] * len(e.ids), label=e.ids[0] % 3) for e in tiny_examples(12)]
    loss, count = loss_sum(model, collate(examples, 0))
    expected = 0.0
    for example in examples:
        hidden = model.net(torch.tensor([example.ids]))
        logits = model.net.logits(hidden[:, 0 if kind == "encoder" else -1])
        expected = expected + F.cross_entropy(logits, torch.tensor([example.label]))
    assert count == 12
    torch.testing.assert_close(loss, expected)
    result = train(model, examples, tiny_config(max_steps=40))
    assert result.losses[-1][1] < result.losses[0][1]


def test_a_wrapped_head_has_the_same_loss():
    model = tiny_model()
    batch = collate(tiny_examples(), 0)
    expected, count = loss_sum(model, batch)

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model.net.lm_head = Wrapped(model.net.lm_head)
    loss, same_count = loss_sum(model, batch)
    torch.testing.assert_close(loss, expected)
    assert same_count == count and loss.requires_grad


class Largest(TorchDispatchMode):
    """Records the most elements that any operation returns in one tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_a_step_never_makes_all_logits():
    model = tiny_model("lora", vocab_size=65536, num_layers=1)
    examples = [Example(list(range(40)), list(range(40))) for _ in range(8)]
    with Largest() as largest:
        train(model, examples, tiny_config(max_steps=1, per_device_train_batch_size=8))
    assert largest.elements <= 16 << 20  # 64 MiB of float32; all logits: 312 x 65536, 78 MiB


@dataclass(frozen=True)
class FakeConfig:
    scale: float = 1.0


@pytest.fixture
def fake(monkeypatch):
    """A technique that only records how its hooks are called."""
    module = types.ModuleType("fake_technique")
    module.Config, module.calls = FakeConfig, []
    module.apply = lambda model, config, context: config
    monkeypatch.setitem(sys.modules, "fake_technique", module)
    monkeypatch.setitem(chain.TECHNIQUES, "fake", "fake_technique")
    return module


def test_hooks_are_called_where_they_belong(fake):
    def encode(model, config, example):
        fake.calls.append("encode")
        return replace(example, ids=example.ids[:4], labels=example.labels[:3] + [7])

    def loss(model, config, batch, hidden):
        fake.calls.append(batch["input_ids"].shape[1])
        total, count = loss_sum(model, batch)
        return config.scale * total, count

    def parameter_groups(model, config, learning_rate, weight_decay):
        chosen = [p for name, p in model.trainable().items() if "q_proj" in name]
        return [{"params": chosen, "lr": 0.0}]

    fake.encode, fake.loss, fake.parameter_groups = encode, loss, parameter_groups
    fake.after_step = lambda model, config, step, total: fake.calls.append((step, total))
    model = apply(tiny_model(), {"fake": {"scale": 3.0}}, Context())
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    result = train(model, tiny_examples(4), tiny_config(max_steps=3), eval_examples=tiny_examples(2, seed=1))
    assert fake.calls == ["encode"] * 6 + [8, (1, 3), 8, (2, 3), 8, (3, 3)]
    assert {torch.equal(p, before[n]) for n, p in model.trainable().items() if "q_proj" in n} == {True}
    assert not torch.equal(model.net.embed_tokens.weight, before["embed_tokens.weight"])
    assert result.losses[0][1] > 2 * result.eval_losses[0][1]  # the technique's loss trains, the plain one evaluates


def test_two_losses_are_refused(fake, monkeypatch):
    fake.loss = loss_sum
    monkeypatch.setitem(chain.TECHNIQUES, "other", "fake_technique")
    model = apply(tiny_model(), ["fake", "other"], Context())
    with pytest.raises(UserError, match="replace the training loss"):
        train(model, tiny_examples(), tiny_config())


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_are_those_of_transformers(name):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    full_name = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(full_name, optimizer, num_warmup_steps=3, num_training_steps=20)
    for step in range(20):
        assert optim.lr_factor(name, step, 20, 3) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_evaluation_is_the_mean_per_target_whatever_the_batches():
    model, examples = tiny_model(), tiny_examples()
    total, count = plain_loss(model, examples)
    for batch_size in (1, 5, 24):
        assert evaluate(model, examples, batch_size) == pytest.approx((total / count).item(), rel=1e-5)


def test_early_stopping_ends_with_the_best_parameters():
    model, held_out = tiny_model(), tiny_examples(6, seed=1)
    config = tiny_config(max_steps=60, learning_rate=0.1, eval_steps=2, early_stopping_patience=3)
    result = train(model, tiny_examples(), config, held_out)
    best = min(loss for _, loss in result.eval_losses)
    assert result.steps < 60
    assert [loss for _, loss in result.eval_losses].index(best) == len(result.eval_losses) - 4
    assert evaluate(model, held_out) == pytest.approx(best, rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = tiny_model()

    def spoil(step, *_):
        if step == 4:
            model.net.norm.weight.data.fill_(float("nan"))

    with pytest.raises(UserError, match="loss became nan at step 5: lower learning_rate"):
        train(model, tiny_examples(), tiny_config(tmp_path), progress=spoil)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_cannot_train_is_refused():
    masked = [Example([1, 2, 3], [-100] * 3)]
    labelled, classifier = replace(masked[0], label=1), tiny_model(head="classification", num_labels=1)
    cases = [
        ("no parameter trains", (tiny_model(None), tiny_examples(), tiny_config())),
        ("no example", (tiny_model(), [], tiny_config())),
        ("masked", (tiny_model(), masked, tiny_config())),
        (
            "gradient_accumulation_steps: must be",
            (tiny_model(), tiny_examples(), tiny_config(gradient_accumulation_steps=0)),
        ),
        ("example 2 has class 1, the model no classes", (tiny_model(), [*tiny_examples(1), labelled], tiny_config())),
        ("example 1 has no class", (classifier, tiny_examples(), tiny_config())),
        ("class 1, the model classes 0 to 0", (classifier, [labelled], tiny_config())),
        ("no evaluation data", (tiny_model(), tiny_examples(), tiny_config(early_stopping_patience=1))),
        ("set output_dir", (tiny_model(), tiny_examples(), tiny_config(report_to="tensorboard"))),
    ]
    for message, (model, examples, config) in cases:
        model.net.requires_grad_(message != "no parameter trains")
        with pytest.raises(UserError, match=message):
            train(model, examples, config)


def test_a_step_without_targets_changes_nothing(caplog):
    masked = [Example([1, 2, 3], [-100] * 3)] * 11
    with caplog.at_level(logging.WARNING):
        _, result = parameters_after(
            tiny_config(per_device_train_batch_size=1, max_steps=12), tiny_examples(1) + masked
        )
    assert len(result.losses) == 1 and result.steps == 12
    assert "11 of 12 training examples have no target" in caplog.text


def test_tensorboard_gets_the_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path, max_steps=3, report_to="tensorboard", save_steps=0)
    _, result = parameters_after(config, eval_examples=tiny_examples(3, seed=1))
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in result.losses]
    assert events.Scalars("train/eval_loss")[0].value == pytest.approx(result.eval_losses[0][1], rel=1e-6)


def test_tensorboard_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train(tiny_model(), tiny_examples(), tiny_config(tmp_path, report_to="tensorboard"))


def test_progress_is_told_every_step():
    calls = []
    _, result = parameters_after(tiny_config(max_steps=4, learning_rate=0.1), progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(step, 4) for step in (1, 2, 3, 4)]
    assert [call[2] for call in calls] == [loss for _, loss in result.losses]
    assert [call[3] for call in calls] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert calls[-1][5] == 0 and all(call[4] > 0 for call in calls)


def test_the_terminal_line():
    class Tty(io.StringIO):
        def isatty(self):
            return True

    plain, tty = io.StringIO(), Tty()
    for stream in (plain, tty):
        show = Terminal(stream)
        for step in (1, 2, 3):
            show(step, 3, 1.5, 1e-4, 12345.6, 100.0 * (3 - step))
    assert plain.getvalue() == (
        "step 1/3 33%  loss 1.5000  lr 1.00e-04  12,346 tokens/s  3m20s left\n"
        "step 3/3 100%  loss 1.5000  lr 1.00e-04  12,346 tokens/s  0s left\n"
    )
    assert tty.getvalue().count("\r") == 1 and tty.getvalue().endswith("\n")
    assert [duration(s) for s in (5, 59.7, 3599, 7265)] == ["5s", "1m00s", "59m59s", "2h01m"]
