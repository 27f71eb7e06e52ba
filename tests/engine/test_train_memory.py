"""What a layer takes while it is computed goes back before the next one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).parents[2]
TOKENS, WIDTH = 1024, 256

CHILD = """
import json, sys
import burnish
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example

def resident(key):
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines[key].split()[0]) * 1024

row = [index % 40 for index in range(int(sys.argv[1]))]
config = TrainConfig(max_steps=1, per_device_train_batch_size=1, gradient_checkpointing=True)
for folder in sys.argv[2:]:
    chain = ["nf4", {"lora": {"r": 2, "target_modules": "all-linear"}}]
    model = burnish.apply(burnish.load(folder, techniques=chain), chain)
    before = resident("VmRSS")
    train(model, [Example(row, row)], config)
    print(json.dumps(resident("VmHWM") - before), flush=True)
"""


def test_twelve_layers_more_cost_what_they_keep(tmp_path):
    """With gradient checkpointing a layer keeps its input, and takes ten times as much while it is computed."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3072, "num_attention_heads": 4, "num_key_value_heads": 4}
    for layers in (2, 14):
        changes = {"num_hidden_layers": layers, "max_position_embeddings": TOKENS, **sizes}
        tiny.write(tmp_path / str(layers), tiny.reference("llama", **changes))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(TOKENS), *(str(tmp_path / name) for name in ("2", "2", "14"))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    _, few, many = map(json.loads, done.stdout.splitlines())  # the first one pays for the libraries
    kept = 12 * TOKENS * WIDTH * 4
    assert many - few < 1.5 * kept + (16 << 20), (few, many)
