"""Whether gptqmodel loads what burnish writes, and says the same: pebble by GPTQ in every number of bits.

    python benchmarks/gptq_loads.py --peer path/to/python

`--peer` is the Python of an environment with gptqmodel, which loads each folder and gives the logits of a few texts in
bfloat16, the one dtype of its own on a CPU beside float16. The mean KL(burnish's in float32 || theirs), beside what
bfloat16 itself costs burnish, and the share of tokens with the same likeliest successor go into
results/gptq_loads.json; rows that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish import chain, device, load
from burnish.chain import Model
from burnish.engine.proof import TEXTS
from burnish.store.checkpoint import save

RESULT = Path(__file__).parent / "results" / "gptq_loads.json"
FORMS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "4 bits, asymmetric": {"bits": 4, "sym": False},
    "4 bits, a row a group": {"bits": 4, "group_size": -1},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2, "group_size": 32},
    "4 bits, 8 in some": {"bits": 4, "bits_pattern": {"v_proj": 8}},
}
PEER = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel, __version__
folder, given, written = sys.argv[1:]
model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16).model.eval()
with torch.no_grad():
    found = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in json.load(open(given))]
torch.save({"logits": found, "version": __version__}, written)
"""


def said(model: Model, ids: list[int]) -> Tensor:
    return model.net.logits(model.net(torch.tensor([ids])))[0].float().log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    python = parser.parse_args().peer
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    for name, form in FORMS.items():
        if name in rows:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder, given, written = (Path(scratch) / part for part in ("model", "ids.json", "logits.pt"))
            model = chain.apply(load("pebble"), {"gptq": {**form, "nsamples": 16, "max_length": 128}})
            save(model, folder)
            model, rounded = load(folder, torch.float32), load(folder, torch.bfloat16)
            ids = [model.tokenizer(text)["input_ids"][:64] for text in TEXTS]
            given.write_text(json.dumps(ids))
            done = subprocess.run([python, "-c", PEER, folder, given, written], capture_output=True, text=True)
            if done.returncode:
                rows[name] = {"error": done.stderr.strip().splitlines()[-1]}
            else:
                found = torch.load(written)
                with torch.no_grad():
                    ours, half = (torch.cat([said(each, row) for row in ids]) for each in (model, rounded))
                theirs = torch.cat(found["logits"]).log_softmax(-1)
                rows[name] = {
                    "kl": kl(ours, theirs),
                    "kl_of_bfloat16": kl(ours, half),
                    "same_likeliest": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
                    "gptqmodel": found["version"],
                }
        print(name, rows[name], flush=True)
        RESULT.write_text(json.dumps({"environment": device.environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
