"""What storing pebble in few bits costs: rounding, GPTQ, AWQ before both; calibration text; gptqmodel beside them.

    python benchmarks/gptq.py --peer path/to/python

Every row quantises the embedded model anew and is measured on the same held-out text of the made-up world: perplexity,
how far it is from the 16-bit model's with the standard error of that difference over the rows, and the mean divergence
KL(16 bits || row) of the next token, which tells small changes better. `--peer` is the Python of an environment with
gptqmodel, which quantises the same model on the same rows by the same grids; burnish reads its folder and measures it.
Calibration is by text as the model knows it, by foreign text and by random tokens. Writes results/gptq.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import burnish
from burnish import chain, device
from burnish.chain import Context, Model, forward
from burnish.compress import calibration

LENGTH = 256
PEER = """
import json, os, sys, time, torch
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its default on two cores is one, which it then refuses
torch.set_num_threads(max(2, int(sys.argv[4])))  # it has no fewer workers
from gptqmodel import GPTQModel, QuantizeConfig
rows = json.load(open(sys.argv[1]))
model = GPTQModel.load(burnish_folder, QuantizeConfig(**json.loads(sys.argv[3])))
start = time.perf_counter()
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
seconds = time.perf_counter() - start
model.save(sys.argv[2])
print("seconds", seconds)
"""


def held_out(model: Model, rows: int) -> Tensor:
    """Rows of documents that no calibration sees."""
    ids: list[int] = []
    for document in islice(burnish.world.documents(seed=2026), 1 << 16):
        for text in [document["text"]] if "text" in document else [turn["content"] for turn in document["messages"]]:
            ids += [*model.tokenizer(text, add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
        if len(ids) >= rows * LENGTH:
            break
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


@torch.no_grad()
def log_probabilities(model: Model, rows: Tensor) -> Tensor:
    return model.net.logits(forward(model, {"input_ids": rows})).float().log_softmax(-1)[:, :-1]


class Judge:
    """Perplexity and divergence on held-out rows, each with the standard error over the rows: of a row's mean loss less
    the base's on the same row, in percent of the perplexity, and of its mean divergence. The base's distributions are
    kept in 16 bits."""

    def __init__(self, rows: Tensor, base: Model):
        self.parts = rows.split(8)
        self.base: list[Tensor] = []
        self.losses: dict[str, Tensor] = {}  # by name, of every row
        for part in self.parts:
            found = log_probabilities(base, part)
            self.base.append(found.half())
            self.add("bf16", -found.gather(2, part[:, 1:, None]).mean((1, 2)))

    def add(self, name: str, losses: Tensor) -> None:
        self.losses[name] = torch.cat([self.losses.get(name, torch.empty(0)), losses])

    def __call__(self, model: Model, name: str = "row") -> dict[str, float]:
        divergences = []
        self.losses.pop(name, None)
        for part, known in zip(self.parts, self.base, strict=True):
            found, wide = log_probabilities(model, part), known.float()
            self.add(name, -found.gather(2, part[:, 1:, None]).mean((1, 2)))
            divergences.append((wide.exp() * (wide - found)).sum(2).mean(1))
        divergence = torch.cat(divergences)
        return {
            "perplexity": round(float(self.losses[name].mean().exp()), 4),
            **self.between(name, "bf16"),
            "divergence": round(float(divergence.mean()), 5),
            "divergence_error": round(standard_error(divergence), 5),
        }

    def between(self, name: str, other: str) -> dict[str, float]:
        """How much higher the perplexity of one is than another's, and the standard error, in percent."""
        apart = self.losses[name] - self.losses[other]
        return {
            "percent": round(100 * float(apart.mean().expm1()), 3),
            "percent_error": round(100 * standard_error(apart), 3),
        }


def standard_error(x: Tensor) -> float:
    return float(x.std() / len(x) ** 0.5)


def peer(python: str, rows: Tensor, options: dict[str, Any], threads: int) -> tuple[Model, float]:
    """gptqmodel's model of the same rows, and its seconds."""
    base = str(Path(burnish.__file__).parent / "assets" / "pebble")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.json").write_text(json.dumps(rows.tolist()))
        given = [f"{folder}/rows.json", f"{folder}/out", json.dumps(options), str(threads)]
        code = f"burnish_folder = {base!r}\n{PEER}"
        done = subprocess.run([python, "-c", code, *given], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        seconds = float(done.stdout.rpartition("seconds ")[2].split()[0])
        return burnish.load(f"{folder}/out"), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--rows", type=int, default=32, help="of calibration, 256 tokens each")
    parser.add_argument("--held-out", type=int, default=300, help="rows to measure on")
    parser.add_argument("--foreign", type=Path, help="a plain text that the model does not know")
    parser.add_argument("--peer", help="Python of an environment with gptqmodel")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gptq.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = burnish.load("pebble")
    judge = Judge(held_out(model, options.held_out), model)
    draw = torch.Generator().manual_seed(0)
    text = {
        "matching": torch.cat([b["input_ids"] for b in calibration.batches(model, Context(), options.rows, LENGTH, "")])
    }
    if options.foreign:
        ids = model.tokenizer(options.foreign.read_text()[: 8 * options.rows * LENGTH])["input_ids"]
        text["foreign"] = torch.tensor(ids[: options.rows * LENGTH]).view(-1, LENGTH)
    text["random"] = torch.randint(3, model.spec.vocab_size, (options.rows, LENGTH), generator=draw)
    rows: list[dict[str, Any]] = [{"row": "bf16", **judge(model, "bf16")}]

    def measure(name: str, techniques: list[Any], calibrated: str = "matching") -> None:
        data = [calibration.as_batch(model, part) for part in text[calibrated].split(8)]
        fresh = burnish.load("pebble", techniques=techniques)
        start = time.perf_counter()
        chain.apply(fresh, techniques, Context(data))
        seconds = round(time.perf_counter() - start, 1)
        add({"row": name, "calibration": calibrated, "seconds": seconds, **judge(fresh, f"{name}, {calibrated}")})

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)

    print(rows[0], flush=True)
    for bits in map(int, options.bits.split(",")):
        form: dict[str, Any] = {"bits": bits, "group_size": 128}
        measure(f"rounded, {bits} bits", [{"int_groups": form}])
        measure(f"awq, rounded, {bits} bits", [{"awq": form}, {"int_groups": form}])
        measure(f"gptq, {bits} bits", [{"gptq": form}])
        measure(f"awq, gptq, {bits} bits", [{"awq": form}, {"gptq": form}])
        if options.peer:
            for act in (False, True):
                theirs, seconds = peer(options.peer, text["matching"], {**form, "desc_act": act}, options.threads)
                name = f"gptqmodel, {bits} bits{', desc_act' * act}"
                figures = judge(theirs, f"{name}, matching")
                add({"row": name, "calibration": "matching", "seconds": round(seconds, 1), **figures})
                apart = judge.between(f"gptq, {bits} bits, matching", f"{name}, matching")
                add({"row": f"gptq, {bits} bits, against {name}", **apart})
        for name in list(text)[1:]:
            measure(f"gptq, {bits} bits", [{"gptq": form}], name)
    measure("gptq, 3 bits, ordered groups", [{"gptq": {"bits": 3, "group_size": 128, "static_groups": False}}])
    measure("gptq, 3 bits, no order", [{"gptq": {"bits": 3, "desc_act": False, "static_groups": False}}])
    record = {"environment": device.environment(), "threads": options.threads, "calibration_rows": options.rows}
    record |= {"held_out_rows": options.held_out, "tokens_a_row": LENGTH, "rows": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
