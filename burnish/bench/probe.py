"""`burnish eval --task lama`: what a model knows, and how much of it each way of asking brings out.

Precision at 1 over the objects of a relation: the share of test facts whose object has the highest mean log-probability
per token. An encoder is given one [MASK] for each token of the object. The facts of a relation are split by subject; no
test fact is trained on, so that what a method adds is access, not knowledge. Methods:

- manual: each hand-written wording; their mean, and the one that is best on the development facts
- search: of mined and hand-written wordings the one that is best on the training facts (LPAQ, arXiv 1911.12543)
- fine_tuning: every weight, asked by the best manual wording
- p_tuning: pseudo tokens around the subject ("GPT Understands, Too", arXiv 2103.10385, section 4.1)
- stability: pseudo tokens around each manual wording; how far the wordings then lie apart, and without them

What trains is run with three learning rates for every seed and ends with the parameters whose loss on the development
facts was the least; of the three runs the one that answers most of these facts counts, the first where several do (what
answers all of them ends the search).
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from burnish import chain
from burnish.bench.measure import EvalConfig, ranked
from burnish.bench.relations import Fact, Relation, mined, read_relations, world_relations, world_texts
from burnish.config import UserError, nearest
from burnish.engine.order import encode
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.bundle import Context, Model
from burnish.model.example import Example, at_mask
from burnish.store.checkpoint import load
from burnish.store.data import encode_rows
from burnish.store.rows import read_rows
from burnish.store.tensors import write_json

METHODS = ("manual", "search", "fine_tuning", "p_tuning", "stability")
ROWS = ("manual_mean", "manual_best", "search", "fine_tuning", "p_tuning")
RATES = {"fine_tuning": (1e-4, 3e-4, 1e-3), "p_tuning": (3e-3, 1e-2, 3e-2)}
RELATIONS = ("food", "employer", "known_for")  # of the world: pebble knows the others by one of their wordings
SEARCHED = 50  # training facts that a search looks at
Trained = tuple[Sequence[Example], Sequence[Example], Sequence[Example]]  # train, dev, test


@dataclass(frozen=True)
class Probe:
    """One model, asked for one relation."""

    base: Model
    relation: Relation
    steps: int
    most: int = 0

    def examples(self, facts: Sequence[Fact], wording: str, soft: bool = False) -> list[Example]:
        """Each fact asked for, with every other object as a wrong choice; for an encoder with [MASK]s, unless P-tuning
        puts them in (`soft`)."""
        tokenizer, spec = self.base.tokenizer, self.base.spec
        choices = [f" {found}" for found in self.relation.objects]
        asked = [(wording.replace("{}", subject), f" {found}") for subject, found in facts]
        rows = [{"prompt": text, "completion": end, "choices": choices, "asked": text} for text, end in asked]
        found = encode_rows(rows, tokenizer, spec.max_positions or 512, where=self.relation.name, paired=spec.paired)
        masks = spec.kind == "encoder" and not soft

        def bare(example: Example) -> Example:
            size = len(example.ids) - (example.labels[-1] == tokenizer.eos_token_id)
            example = replace(example, ids=example.ids[:size], labels=example.labels[:size])
            return cloze(tokenizer, example) if masks else example

        return [replace(bare(one), choices=[bare(other) for other in one.choices or ()]) for one in found]

    def precision(self, model: Model, examples: Sequence[Example]) -> float:
        right = ranked(model, encode(model, examples))
        return sum(right) / len(right)

    def trained(self, techniques: list[Any], parts: Trained, rate: float, seed: int) -> Model:
        """A copy of the base, trained on the first part, with the parameters of the second's least loss."""
        model = replace(self.base, net=copy.deepcopy(self.base.net), chain=[])
        chain.apply(model, techniques, Context(seed=seed))
        every = max(1, self.steps // 6)
        config = TrainConfig(
            learning_rate=rate, max_steps=self.steps, per_device_train_batch_size=16, warmup_ratio=0.1, seed=seed,
            eval_steps=every, load_best_model_at_end=True, save_steps=0,
        )  # fmt: skip
        alone = [[replace(example, choices=None) for example in part] for part in parts[:2]]
        train(model, alone[0], config, alone[1])
        return model

    def tuned(self, method: str, techniques: list[Any], parts: Trained, seeds: Sequence[int]) -> dict[str, Any]:
        """Test precision for every seed, each with the learning rate that is best for it on the development facts."""
        values, rates = [], []
        for seed in seeds:
            tried = {}
            for rate in RATES[method]:
                model = self.trained(techniques, parts, rate, seed)
                tried[rate] = self.precision(model, parts[1]), self.precision(model, parts[2])
                if tried[rate][0] == 1:
                    break
            rates.append(max(tried, key=lambda rate: tried[rate][0]))
            values.append(tried[rates[-1]][1])
        return {"value": statistics.mean(values), "values": values, "learning_rates": rates}

    def run(self, methods: Sequence[str], seeds: Sequence[int], texts: Sequence[str]) -> dict[str, Any]:
        """The methods' results; manual wordings are always asked, since the others need the best of them."""
        splits = self.relation.split(self.most)
        found: dict[str, Any] = {"facts": [len(part) for part in splits], "objects": len(self.relation.objects)}

        def parts(wording: str, soft: bool = False) -> Trained:
            train, dev, test = (self.examples(part, wording, soft) for part in splits)
            return train, dev, test

        scored = {}
        for wording in self.relation.wordings:
            _, dev, test = parts(wording)
            scored[wording] = self.precision(self.base, dev), self.precision(self.base, test)
        best = max(scored, key=lambda wording: scored[wording][0])
        tests = [test for _, test in scored.values()]
        found["manual"] = {
            "wordings": {wording: test for wording, (_, test) in scored.items()},
            "best": best,
            "spread": statistics.pstdev(tests),
        }
        found |= {"manual_mean": {"value": statistics.mean(tests)}, "manual_best": {"value": scored[best][1]}}
        if "search" in methods:
            candidates = dict.fromkeys([*mined(splits[0], texts), *self.relation.wordings])
            asked = splits[0][:SEARCHED]
            chosen = max(candidates, key=lambda wording: self.precision(self.base, self.examples(asked, wording)))
            value = self.precision(self.base, self.examples(splits[2], chosen))
            found["search"] = {"value": value, "wording": chosen, "candidates": len(candidates)}
        if "fine_tuning" in methods:
            found["fine_tuning"] = self.tuned("fine_tuning", ["full"], parts(best), seeds)
        technique = [{"p_tuning": {"template": template(self.base)}}]
        if "p_tuning" in methods:
            found["p_tuning"] = self.tuned("p_tuning", technique, parts("{}", soft=True), seeds)
        if "stability" in methods:
            scores = {}
            for wording in self.relation.wordings:
                scores[wording] = self.tuned("p_tuning", technique, parts(wording, soft=True), seeds)["values"]
            spreads = [statistics.pstdev(values) for values in zip(*scores.values(), strict=True)]
            mean = statistics.mean(value for values in scores.values() for value in values)
            found["stability"] = {"value": mean, "wordings": scores, "spread": statistics.mean(spreads)}
        return found


def cloze(tokenizer: Any, example: Example) -> Example:
    """A prompt and its completion as a sentence with a [MASK] for each token of the completion, and a full stop."""
    ids = tokenizer(f"{example.fields['asked']} {tokenizer.mask_token}.")["input_ids"]
    ids, labels = at_mask(ids, tokenizer.mask_token_id, example.ids[example.prompt_length :])
    return replace(example, ids=ids, labels=labels)


def template(model: Model) -> str:
    """Pseudo tokens around what is asked; an encoder reads them between it and the [MASK], in a sentence's own order.

    The paper's template for BERT, P*3 [MASK] P*3 subject P*3, puts the answer before the subject, where an encoder
    whose sentences all tell the subject first never read it; docs/results.md has what that costs.
    """
    if model.spec.kind != "encoder":
        return "[P*3] {prompt} [P*3]"
    first, mask, last = (getattr(model.tokenizer, f"{name}_token") for name in ("cls", "mask", "sep"))
    return f"{first}{{asked}}[P*6]{mask}.{last}"


def averages(relations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each row's mean over the relations, and the mean spreads over wordings."""
    found: dict[str, Any] = {}
    for row in (*ROWS, "stability"):
        values = [entry[row]["value"] for entry in relations.values() if row in entry]
        if values:
            found[row] = statistics.mean(values)
    for row in ("manual", "stability"):
        spreads = [entry[row]["spread"] for entry in relations.values() if row in entry]
        if spreads:
            found[f"{row}_spread"] = statistics.mean(spreads)
    return found


def probe(
    model: Model,
    relations: Iterable[Relation],
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
    texts: Sequence[str] = (),
    steps: int = 60,
    most: int = 0,
) -> dict[str, Any]:
    """Every method on every relation, of which `most` facts are taken (0: all): {"relations": ..., "average": ...}."""
    if model.spec.head not in ("lm", "masked_lm"):
        has = "has no head" if model.spec.head == "none" else "has a classifier's head"
        raise UserError(
            f"task 'lama': it asks for words, and this model {has}; take a language model or a masked one, or train "
            "a head first: burnish tune MODEL --techniques '[{transfer: {head: lm}}]'"
        )
    found: dict[str, dict[str, Any]] = {}
    for relation in relations:
        found[relation.name] = Probe(model, relation, steps, most).run(methods, seeds, texts)
        print(row_text(relation.name, found[relation.name]), file=sys.stderr, flush=True)
    return {"relations": found, "average": averages(found)}


def row_text(name: str, entry: dict[str, Any]) -> str:
    """One relation's or the average's line of the table, in percent."""
    values = [entry.get(row) for row in ROWS]
    cells = [value["value"] if isinstance(value, dict) else value for value in values]
    return f"{name:<24}" + "".join(f"{'' if cell is None else f'{cell:.1%}':>14}" for cell in cells)


def run(config: EvalConfig) -> int:
    """Probe and print; `output_dir` gets probe.json."""
    for method in config.methods:
        if method not in METHODS:
            raise UserError(f"methods: '{method}' is unknown{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    if not config.seeds or config.max_steps < 1:
        raise UserError("seeds, max_steps: at least one of each is needed")
    relations = read_relations(config.data) if config.data else world_relations()
    known = [relation.name for relation in relations]
    wanted = config.relations or (known if config.data else RELATIONS)
    for name in wanted if "all" not in wanted else ():
        if name not in known:
            raise UserError(f"relations: '{name}' is unknown{nearest(name, known)}; known: {', '.join(known)}")
    relations = [relation for relation in relations if "all" in wanted or relation.name in wanted]
    for relation in relations:
        relation.split(config.max_rows)
    texts = []
    if config.mine_from:
        texts = [str(value) for row in read_rows(config.mine_from) for value in row.values()]
    elif not config.data:
        texts = world_texts()
    model = load(config.model, torch.float32)
    found = {"model": config.model, "identity": model.identity, "seeds": config.seeds}
    methods = config.methods or METHODS
    found |= probe(model, relations, methods, config.seeds, texts, config.max_steps, config.max_rows)
    if config.output_dir is not None:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(found, Path(config.output_dir) / "probe.json")
    print(json.dumps(found, indent=1) if config.json else report(found))
    return 0


def report(found: dict[str, Any]) -> str:
    """The table and the two lines on stability."""
    titles = ("manual mean", "best manual", "searched", "fine-tuned", "P-tuning")
    lines = [f"{'precision at 1':<24}" + "".join(f"{title:>14}" for title in titles)]
    lines += [row_text(name, entry) for name, entry in found["relations"].items()]
    average = found["average"]
    lines.append(row_text("average", average))
    for row, text in (("manual", "manual wordings"), ("stability", "the same with P-tuning")):
        if f"{row}_spread" in average:
            mean = average["manual_mean" if row == "manual" else row]
            lines.append(f"{text}: {mean:.1%}, standard deviation over wordings {average[f'{row}_spread']:.1%}")
    return "\n".join(lines)
