"""Every technique on every family in every circumstance, held to the table of `contract_cells.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import contract_cells
import pytest
import tiny
import tiny_foreign
import torch
from contract_cells import CELLS, FOREIGN, NOT_APPLICABLE, REFUSED, ROWS, outcome
from torch import Tensor

import burnish
from burnish import chain
from burnish.chain import TECHNIQUES, Context, Model, TechniqueSpec, forward
from burnish.config import UserError
from burnish.engine.loss import loss_sum
from burnish.engine.order import collated, encode, packed
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import IGNORE, Example
from burnish.model.families import FAMILIES
from burnish.model.spec import Head
from burnish.model.surgery import linears
from burnish.store.checkpoint import load, save

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
SOFT_LENGTHS = (None, 0, 2, 3)
COMPLETION = 3


@dataclass
class Case:
    """One technique on one family."""

    technique: str
    family: str
    folder: Path
    scratch: Path

    @property
    def spec(self) -> TechniqueSpec:
        return {self.name: ROWS[self.technique].options}

    @property
    def name(self) -> str:
        return ROWS[self.technique].technique or self.technique

    def base(self, *before: TechniqueSpec, head: Head | None = None) -> Model:
        model = load(self.folder, head=head)
        return chain.apply(model, before) if before else model

    def model(self, *before: TechniqueSpec) -> Model:
        return chain.apply(load(self.folder), [*before, self.spec], Context(seed=3))

    def documents(self, model: Model, soft_lengths=SOFT_LENGTHS) -> list[Example]:
        """Examples through the technique's `encode` hook."""
        return list(encode(model, self.examples(model, soft_lengths)))

    def examples(self, model: Model, soft_lengths=SOFT_LENGTHS) -> list[Example]:
        """Four examples of different length; the lengths of their soft prompts differ too."""
        draw = torch.Generator().manual_seed(5)
        found = []
        for number, (size, soft) in enumerate(zip((9, 5, 7, 6), soft_lengths, strict=True)):
            ids = torch.randint(6, 50, (size,), generator=draw).tolist()
            labels = [IGNORE] * (size - COMPLETION) + ids[-COMPLETION:]
            if model.spec.kind == "encoder":  # [CLS] words [SEP], one word masked
                ids, labels = [3, *ids, 4], [IGNORE, *labels[:-1], IGNORE, IGNORE]
                ids = [5 if label != IGNORE else token for token, label in zip(ids, labels, strict=True)]
            example = Example(ids, labels, fields={"word": "cat"})
            if self.technique == "choice_loss" and model.spec.generates:
                example.choices = [replace(example, ids=[*ids[:-2], 7], labels=[*labels[:-2], 7])]
            if ROWS[self.technique].start == "soft":
                example = replace(example, virtual_tokens=soft)
            if model.spec.head == "classification":
                example = replace(example, labels=[IGNORE] * len(ids), label=number % 2)
            found.append(example)
        return found


@torch.no_grad()
def outputs(model: Model, batch: dict[str, Tensor]) -> list[Tensor]:
    """Per document of a batch: (tokens, vocabulary) logits, or (labels,) of a classifier."""
    hidden = forward(model, batch)
    if model.spec.head == "classification":
        return list(model.net.logits(model.net.pool(hidden, batch["attention_mask"])))
    logits, segments = model.net.logits(hidden), batch["segment_ids"]
    rows = range(len(segments))
    return [logits[row][segments[row] == s] for row in rows for s in range(1, int(segments[row].max()) + 1)]


def alone(model: Model, examples: list[Example]) -> list[Tensor]:
    return [outputs(model, collated(model, [example]))[0] for example in examples]


@torch.no_grad()
def disturb(model: Model) -> Model:
    """Move the trainable parameters, so that the technique does something."""
    draw = torch.Generator().manual_seed(11)
    for parameter in model.trainable().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def assert_close(left: list[Tensor], right: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or CLOSE))


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert_close(left, right, atol=0, rtol=0)


def basics(case: Case, *before: TechniqueSpec) -> None:
    check_start(case, *before)
    model = case.model(*before)
    assert set(model.trainable()) == ROWS[case.technique].trains(model.net)
    check_gradients(model, case.documents(model))
    check_saving(disturb(model), case.documents(model), case.scratch / "saved")
    check_finalize(case, *before)
    check_merge(case, *before)


def check_start(case: Case, *before: TechniqueSpec) -> None:
    base, model, start = case.base(*before), case.model(*before), ROWS[case.technique].start
    if start == "hidden":
        base = case.base(*before, head="none") if base.spec.paired else base  # of which the encoder stays
        batch = collated(model, case.documents(model))
        with torch.no_grad():
            torch.testing.assert_close(forward(model, batch), forward(base, batch), atol=0, rtol=0)
        return
    if start == "weights":
        stored = {path: linear.weight.dequantize() for path, linear in linears(model.net)}
        base = case.base()
        with torch.no_grad():
            for path, linear in linears(base.net):
                linear.weight.dense.copy_(stored[path])
    plain = [replace(e, slots=None, virtual_tokens=None) for e in case.documents(model, (0, 0, 0, 0))]
    if start == "changed":
        both = zip(alone(model, plain), alone(base, plain), strict=True)
        assert not all(torch.allclose(a, b, **CLOSE) for a, b in both)
        return
    assert_close(alone(model, case.documents(model, (0, 0, 0, 0))), alone(base, plain))
    if start == "soft":
        longer, none = alone(model, case.documents(model)), alone(base, plain)
        same = [a.shape == b.shape and torch.allclose(a, b, **CLOSE) for a, b in zip(longer, none, strict=True)]
        assert same == [False, True, False, False]  # SOFT_LENGTHS: the second row has no virtual token


def check_gradients(model: Model, examples: list[Example]) -> None:
    batch = collated(model, examples)
    trainable = model.trainable()
    if not trainable:
        with pytest.raises(UserError, match="no parameter trains"):
            train(model, examples, TrainConfig(max_steps=1))
        return
    model.net.train()
    for disturbed in (False, True):
        loss, count = loss_sum(disturb(model) if disturbed else model, batch)
        loss.backward()
        assert count and torch.isfinite(loss)
        having = {name for name, p in model.net.named_parameters() if p.grad is not None}
        assert having <= set(trainable)
        moving = {name for name in having if trainable[name].grad.abs().max() > 0}
        assert moving == set(trainable) if disturbed else moving
        model.net.zero_grad()
    model.net.eval()


def check_saving(model: Model, examples: list[Example], folder: Path) -> Model:
    want = alone(model, examples)
    again = burnish.load(save(model, folder))
    assert chain.describe(again) == chain.describe(model)
    assert set(again.trainable()) == set(model.trainable())
    assert_equal(alone(again, examples), want)
    return again


def check_finalize(case: Case, *before: TechniqueSpec) -> None:
    if not hasattr(chain.technique(case.name), "finalize"):
        return
    model = disturb(case.model(*before))
    examples = case.documents(model)
    want, size = alone(model, examples), sum(p.numel() for p in model.trainable().values())
    chain.finalize(model)
    assert sum(p.numel() for p in model.trainable().values()) < size
    assert_close(alone(model, examples), want)
    check_saving(model, examples, case.scratch / "finalized")


def check_merge(case: Case, *before: TechniqueSpec) -> None:
    if not hasattr(chain.technique(case.name), "merge"):
        return
    model = disturb(case.model(*before))
    examples = case.documents(model)
    want = alone(model, examples)
    assert len(chain.merge(model)) == 1
    assert case.name not in [link.name for link in model.chain] and not model.trainable()
    close = {"atol": 0.1, "rtol": 0.05} if before else {}  # a quantised weight becomes bfloat16
    assert_close(alone(model, examples), want, **close)
    again = check_saving(model, examples, case.scratch / "merged")
    for merged, name in ((model, "in-memory"), (again, "loaded")):  # and the merged model is a base like any other
        chain.apply(merged, [case.spec])
        check_saving(disturb(merged), examples, case.scratch / f"again-{name}")


def check_after_nf4(case: Case) -> None:
    basics(case, "nf4")


def check_left_padded(case: Case) -> None:
    model = disturb(case.model())
    examples = case.documents(model)
    want = alone(model, examples)
    with torch.no_grad():
        losses = [loss_sum(model, collated(model, [example])) for example in examples]
        for side in ("left", "right"):
            batch = collated(model, examples, side, multiple_of=8)
            assert_close(outputs(model, batch), want)
            loss, count = loss_sum(model, batch)
            assert count == sum(n for _, n in losses)
            torch.testing.assert_close(loss, sum(part for part, _ in losses), **CLOSE)


def check_packed(case: Case) -> None:
    model = disturb(case.model())
    first, neighbour, *others = case.documents(model)
    assert len({len(example.ids) for example in (first, neighbour, *others)}) > 2
    batch = packed(model, [[first, neighbour, others[0]], others[1:]], 48)
    got = outputs(model, batch)
    assert_close(got, alone(model, [first, neighbour, *others]))
    with torch.no_grad():
        parts = [loss_sum(model, collated(model, [e]))[0] for e in (first, neighbour, *others)]
        torch.testing.assert_close(loss_sum(model, batch)[0], sum(parts), **CLOSE)
    changed = replace(neighbour, ids=[token and 6 + (token + 7) % 40 for token in neighbour.ids])
    perturbed = outputs(model, packed(model, [[first, changed, others[0]], others[1:]], 48))
    assert not torch.equal(perturbed.pop(1), got.pop(1))
    assert_equal(perturbed, got)


def part(batch: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Some columns of a batch; sources come whole, with the first."""
    sources = {name: t for name, t in batch.items() if name.startswith("source_")}
    columns = {name: t[:, start:end] for name, t in batch.items() if name not in sources}
    return {**columns, **(sources if start == 0 else {})}


def check_cached_generation(case: Case) -> None:
    model = disturb(case.model())
    batch = collated(model, case.documents(model), "right" if model.spec.paired else "left")
    mask, width = batch["attention_mask"], batch["input_ids"].shape[1]
    with torch.no_grad():
        whole = model.net.logits(forward(model, batch))
        cache = model.net.new_cache(len(mask), width + 4)
        starts = [0, *range(width - COMPLETION, width + 1)]  # the prompts, then one token at a time
        pieces = [
            model.net.logits(forward(model, part(batch, start, end), cache))
            for start, end in zip(starts, starts[1:], strict=False)
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask], whole[mask], **CLOSE)


class Stopped(Exception):
    pass


def check_resume(case: Case) -> None:
    row = ROWS[case.technique]
    more = [{row.trained_with: ROWS[row.trained_with].options}] if row.trained_with else []

    def run(folder: Path | None, stop: int = 0) -> tuple[Model, list[tuple[int, float]]]:
        def progress(step: int, *_) -> None:
            if step == stop:
                raise Stopped

        model = chain.apply(load(case.folder), [case.spec, *more], Context(seed=3))
        config = TrainConfig(
            folder, learning_rate=1e-2, per_device_train_batch_size=2, max_steps=4, save_steps=2, logging_steps=1
        )
        result = train(model, examples, config, progress=progress if stop else None)
        return model, result.losses

    examples = case.examples(case.model())
    whole, losses = run(None)
    with pytest.raises(Stopped):
        run(case.scratch / "run", stop=3)
    resumed, again = run(case.scratch / "run")
    assert [step for step, _ in losses] == [1, 2, 3, 4] and again == losses
    assert losses[0][1] != losses[1][1]
    for name, parameter in whole.net.named_parameters():
        assert torch.equal(parameter, resumed.net.get_parameter(name)), name


CHECKS: dict[str, Callable[[Case], None]] = {
    "plain": basics,
    "after NF4": check_after_nf4,
    "left-padded": check_left_padded,
    "packed": check_packed,
    "cached generation": check_cached_generation,
    "resume": check_resume,
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", [*FAMILIES, *FOREIGN])
@pytest.mark.parametrize("technique", ROWS)
def test_contract(technique: str, family: str, cell: str, root: Path, tmp_path: Path) -> None:
    status, reason = outcome(technique, family, cell)
    if status == NOT_APPLICABLE:
        pytest.skip(reason)
    folder = tiny_foreign.folder if family in FOREIGN else tiny.folder
    case = Case(technique, family, folder(root, family), tmp_path)
    if status == REFUSED:
        with pytest.raises(UserError, match=re.escape(reason)):
            CHECKS[cell](case)
    else:
        CHECKS[cell](case)


def test_every_technique_has_a_row() -> None:
    assert {name for name in ROWS if ":" not in name} == set(TECHNIQUES), (
        "give a new technique its row in tests/contract_cells.py"
    )
    assert set(contract_cells.FOREIGN_PROJECTIONS) == set(FOREIGN)
    assert set(contract_cells.PROJECTIONS) == set(FAMILIES), "give a new family its projections there"


def test_capabilities_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "capabilities.md"
    rewrite = "run: python tests/contract_cells.py > docs/capabilities.md"
    assert page.read_text(encoding="utf-8") == contract_cells.page(), rewrite
