"""What quantisation-aware training wins back of what storing pebble in few bits loses.

    python benchmarks/qat.py

Every row starts from the embedded model in float32. Trained rows take the same steps over the same documents of the
made-up world, others than pebble's own; learning rates are chosen on development documents, at the form that
`--choose-at` names, and rows are measured on others again. A control takes the same steps without rounding, and is
rounded afterwards, which tells apart what more training gives. `recovered` is the share of what rounding lost that is
back, (rounded - row) / (rounded - float32) in perplexity; `divergence` is the mean KL(float32 || row) of the next
token, which the text's own randomness does not blur, and `recovered_divergence` the share of rounding's that is gone;
`recovered_of_control` is `recovered` with the control, rounded and as it is, in the places of the two. Forms in which
rounding loses less than one part in 500 are not trained. Writes results/qat.json; rows that are in the file already are
kept, unless their settings were others.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import burnish
from burnish import chain, device
from burnish.chain import Context, Model
from burnish.engine.settings import TrainConfig
from burnish.engine.train import evaluate, train
from burnish.model.example import Example
from burnish.store.data import encode_rows
from burnish.world.corpus import tagged_documents

LENGTH = 256
TEST, DEVELOPMENT, TRAIN = 2026, 2027, 7  # seeds of the world's documents; pebble's is 0
FORMS = {
    "4 bits, groups of 128": {"bits": 4, "group_size": 128},
    "3 bits, groups of 128": {"bits": 3, "group_size": 128},
    "3 bits, groups of 32": {"bits": 3, "group_size": 32},
    "2 bits, groups of 32": {"bits": 2, "group_size": 32},
}
LORA = {"lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}
KINDS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "full": lambda form: [{"qat": form}],
    "lora": lambda form: [LORA, {"qat": form}],
    "lora distilled": lambda form: [LORA, {"qat": {**form, "distill": True}}],
}


def documents(model: Model, seed: int, count: int) -> list[Example]:
    texts = (row for _, row in tagged_documents(seed) if set(row) == {"text"})
    return encode_rows(list(islice(texts, count)), model.tokenizer, LENGTH, train_on="all", where="world")


def perplexity(model: Model, examples: list[Example]) -> float:
    return math.exp(evaluate(model, examples))


@torch.no_grad()
def log_probabilities(model: Model, examples: list[Example]) -> list[Tensor]:
    """Of the next token, (1, tokens, vocabulary) for each document."""
    batches = [{"input_ids": torch.tensor([example.ids])} for example in examples]
    return [model.net.logits(chain.forward(model, batch)).float().log_softmax(-1) for batch in batches]


def fresh() -> Model:
    return burnish.load("pebble", torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--trial-steps", type=int, default=60, help="of each learning rate that is tried")
    parser.add_argument("--batch", type=int, default=4, help="rows of 256 tokens in a step")
    parser.add_argument("--held-out", type=int, default=300, help="documents to measure on")
    parser.add_argument("--rates", default="full:1e-5,3e-5,1e-4;lora:1e-4,3e-4,1e-3;lora distilled:3e-4,1e-3,2e-3")
    parser.add_argument("--choose-at", default="3 bits, groups of 32", choices=FORMS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help="what is trained")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "qat.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = {name: list(map(float, x.split(","))) for name, x in (y.split(":") for y in options.rates.split(";"))}
    settings: dict[str, Any] = {"threads": options.threads, "steps": options.steps}
    settings |= {"tokens_a_step": options.batch * LENGTH, "held_out_documents": options.held_out}
    settings |= {"rates_chosen_at": options.choose_at, "trial_steps": options.trial_steps, "lora": LORA["lora"]}
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    kept = known if all(known.get(name) == value for name, value in settings.items()) else {}
    trials: list[dict[str, Any]] = kept.get("trials", [])
    rows: list[dict[str, Any]] = kept.get("rows", [])
    base = fresh()
    held_out = documents(base, TEST, options.held_out)
    development = documents(base, DEVELOPMENT, options.held_out // 3)
    examples = documents(base, TRAIN, options.steps * options.batch * 8)  # more than the steps see

    def trained(techniques: list[Any], rate: float, steps: int) -> Model:
        model = chain.apply(fresh(), techniques)
        run = TrainConfig(
            learning_rate=rate,
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            warmup_ratio=0.1,
            packing=True,
            max_length=LENGTH,
        )
        train(model, examples, run)
        chain.merge(model)
        return chain.finalize(model)

    known_distributions = [x.half() for x in log_probabilities(base, held_out)]

    def divergence(model: Model) -> float:
        total = 0.0
        for example, known in zip(held_out, known_distributions, strict=True):
            (found,), wide = log_probabilities(model, [example]), known.float()
            total += float((wide.exp() * (wide - found)).sum())
        return total / sum(len(example.ids) for example in held_out)

    def chosen(name: str, techniques: list[Any], kind: str) -> float:
        """The learning rate with the lowest perplexity on the development documents, after fewer steps."""
        for rate in rates[kind]:
            if not any((trial["row"], trial["learning_rate"]) == (name, rate) for trial in trials):
                found = perplexity(trained(techniques, rate, options.trial_steps), development)
                trials.append({"row": name, "learning_rate": rate, "development_perplexity": round(found, 5)})
                print(trials[-1], flush=True)
        own = [trial for trial in trials if trial["row"] == name]
        return min(own, key=lambda trial: trial["development_perplexity"])["learning_rate"]

    def measured(name: str, make: Callable[[], Model], form: str = "", **more: Any) -> float:
        """The perplexity of a row, which is made where it is not known."""
        if (name, form) not in {(row["row"], row["form"]) for row in rows}:
            model = make()
            found = {"perplexity": round(perplexity(model, held_out), 5), "divergence": round(divergence(model), 5)}
            rows.append({"row": name, "form": form, **more, **found})
            print(rows[-1], flush=True)
        by_name = {(row["row"], row["form"]): row["perplexity"] for row in rows}
        far = {row["form"]: row["divergence"] for row in rows if row["row"] == "int_groups"}

        def share(row: dict[str, Any], rounded: str, whole: str) -> float:
            lost = by_name[rounded, row["form"]]
            return round((lost - row["perplexity"]) / (lost - by_name[whole, ""]), 3)

        for row in rows:
            if row["form"] and row["row"] != "int_groups":
                row["recovered"] = share(row, "int_groups", "float32")
                row["recovered_divergence"] = round(1 - row["divergence"] / far[row["form"]], 3)
            if row["row"].startswith("qat") and ("control, rounded", row["form"]) in by_name:
                row["recovered_of_control"] = share(row, "control, rounded", "control")
        record = {"environment": device.environment(), **settings, "trials": trials, "rows": rows}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        return by_name[name, form]

    def stored(name: str, config: dict[str, Any], start: Mapping[str, Tensor] | None = None) -> Model:
        model = fresh()
        if start is not None:
            model.net.load_state_dict(start)
        return chain.apply(model, {name: config}, Context(examples=examples))

    whole = measured("float32", fresh)
    lossy = {}
    for form, config in FORMS.items():
        if measured("int_groups", partial(stored, "int_groups", config), form) > 1.002 * whole:
            lossy[form] = config
        measured("gptq", partial(stored, "gptq", {**config, "nsamples": 32, "max_length": LENGTH}), form)

    for kind in options.kinds.split(","):
        rate = chosen(f"qat, {kind}", KINDS[kind](FORMS[options.choose_at]), kind)
        for form, config in lossy.items():
            run = partial(trained, KINDS[kind](config), rate, options.steps)
            measured(f"qat, {kind}", run, form, learning_rate=rate)

    @cache
    def control() -> Model:
        return trained(["full"], chosen("control", ["full"], "full"), options.steps)

    measured("control", control)
    for form, config in lossy.items():
        rounded = partial(lambda config: stored("int_groups", config, control().net.state_dict()), config)
        measured("control, rounded", rounded, form)


if __name__ == "__main__":
    main()
