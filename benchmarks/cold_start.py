"""From the shell to the first token: `burnish generate` against a plain torch script, on the 134M twin in bfloat16.

    python benchmarks/cold_start.py [--rounds 7]

The plain script is what one would write by hand for this one model: torch, safetensors and tokenizers, the weights
loaded by `load_file`, one forward, the most likely token. Both are whole processes, timed from outside in turn, with
the page cache warm; the tokens must agree. Writes benchmarks/results/cold_start.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "the cat sees the dog"
RESULT = Path(__file__).parent / "results" / "cold_start.json"
PLAIN = """
import json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

folder = Path(sys.argv[1])
c = json.loads((folder / "config.json").read_text())
w = load_file(folder / "model.safetensors")
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
with torch.inference_mode():
    ids = torch.tensor(tokenizer.encode(sys.argv[2]).ids)
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    size, eps = c.get("head_dim") or c["hidden_size"] // heads, c.get("rms_norm_eps", 1e-6)
    base = c.get("rope_theta", 10000.0)
    angles = torch.arange(len(ids))[:, None] * base ** (-torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat((f(angles),) * 2, -1).bfloat16() for f in (torch.cos, torch.sin))

    def rotate(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = F.rms_norm(x, x.shape[-1:], w[p + "input_layernorm.weight"], eps)
        parts = (F.linear(h, w[p + f"self_attn.{n}_proj.weight"]) for n in "qkv")
        q, k, v = (part.view(len(ids), -1, size).transpose(0, 1) for part in parts)
        a = F.scaled_dot_product_attention(rotate(q)[None], rotate(k)[None], v[None], is_causal=True, enable_gqa=True)
        x = x + F.linear(a[0].transpose(0, 1).reshape(len(ids), -1), w[p + "self_attn.o_proj.weight"])
        h = F.rms_norm(x, x.shape[-1:], w[p + "post_attention_layernorm.weight"], eps)
        h = F.silu(F.linear(h, w[p + "mlp.gate_proj.weight"])) * F.linear(h, w[p + "mlp.up_proj.weight"])
        x = x + F.linear(h, w[p + "mlp.down_proj.weight"])
    x = F.rms_norm(x[-1], x.shape[-1:], w["model.norm.weight"], eps)
    token = F.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"])).argmax().item()
    print(json.dumps({"token": token, "text": tokenizer.decode([token])}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    from burnish import device
    from burnish.bench.twin import write_twin

    with tempfile.TemporaryDirectory() as scratch:
        folder, script = Path(scratch) / "twin", Path(scratch) / "plain.py"
        write_twin(folder, "pebble")
        script.write_text(PLAIN)
        python = [sys.executable]
        commands = {
            "plain torch": [*python, str(script), str(folder), PROMPT],
            "burnish": [
                *python,
                *["-m", "burnish", "generate"],
                str(folder),
                "--prompt",
                PROMPT,
                "--max_new_tokens",
                "1",
                "--json",
            ],
            "import torch": [*python, "-c", "import torch"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        outputs: dict[str, str] = {}
        for turn in range(options.rounds + 1):
            for name in list(commands)[:: -1 if turn % 2 else 1]:
                began = time.perf_counter()
                done = subprocess.run(commands[name], capture_output=True, text=True, check=True)
                seconds[name].append(time.perf_counter() - began)
                outputs[name] = done.stdout
    tokens = json.loads(outputs["burnish"])["ids"], [json.loads(outputs["plain torch"])["token"]]
    assert tokens[0] == tokens[1], tokens
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first filled the caches
    ratio = medians["burnish"] / medians["plain torch"]
    print({name: round(value, 2) for name, value in medians.items()}, f"ratio {ratio:.2f}")
    record = {"environment": device.environment(), "seconds": seconds, "median_seconds": medians, "ratio": ratio}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
