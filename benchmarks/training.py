"""What the measurements of training steps share: the base, a meter of steps, the loops, processes, and the ratios."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RATE, CLIP = 1e-3, 1.0


def write_base(folder: Path, shape: dict[str, Any]) -> None:
    """A random Llama in bfloat16, in one file, with a one-word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder, max_shard_size="100GB")
    torch.set_default_dtype(torch.float32)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)


def batch_of(case: dict[str, Any], vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """(`batch` rows of `length` random ids, their labels: the share `trained` of each row, at its end)."""
    draw = random.Random(0)
    rows = [[draw.randrange(vocabulary) for _ in range(case["length"])] for _ in range(case["batch"])]
    first = round(case["length"] * (1 - case["trained"]))
    return rows, [[-100] * first + row[first:] for row in rows]


def kernel_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Meter:
    """Wall and CPU seconds and loss of every step, and resident bytes above the start: when the model is loaded, the
    peak until then, and the peak over all and after two steps."""

    def __init__(self) -> None:
        self.baseline = kernel_bytes("VmRSS")
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        reset_peak()

    def start(self) -> None:
        self.loaded = kernel_bytes("VmRSS")
        self.load_peak = self.peak = kernel_bytes("VmHWM")
        self.began = time.perf_counter(), time.process_time()

    def step(self, loss: float) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds.append(now[0] - self.began[0])
        self.cpu_seconds.append(now[1] - self.began[1])
        self.losses.append(loss)
        self.peak = max(self.peak, kernel_bytes("VmHWM"))
        if len(self.seconds) == 2:
            reset_peak()
        self.began = time.perf_counter(), time.process_time()

    def result(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "imports_bytes": self.baseline,
            "loaded_bytes": self.loaded - self.baseline,
            "load_peak_bytes": self.load_peak - self.baseline,
            "peak_bytes": self.peak - self.baseline,
            "steady_peak_bytes": kernel_bytes("VmHWM") - self.baseline,
        }


def train_burnish(meter: Meter, model: Any, case: dict[str, Any], steps: int, **options: Any) -> dict[str, Any]:
    """The steps of burnish's loop on the case's batches; `options` are those of `TrainConfig`."""
    from burnish.engine.settings import TrainConfig
    from burnish.engine.train import train
    from burnish.model.example import Example

    rows, labels = batch_of(case, model.spec.vocab_size)
    config = TrainConfig(
        learning_rate=RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=case["batch"],
        max_steps=steps,
        max_grad_norm=CLIP,
        **options,
    )
    meter.start()
    train(
        model,
        [Example(*pair) for pair in zip(rows, labels, strict=True)],
        config,
        progress=lambda step, total, loss, lr, speed, eta: meter.step(loss),
    )
    return meter.result()


def base_of_peft(folder: Path, dtype: str = "bfloat16", **options: Any) -> Any:
    """The base as transformers loads it."""
    import torch
    from transformers import LlamaForCausalLM

    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa", **options}
    base = LlamaForCausalLM.from_pretrained(folder, **options)
    base.config.use_cache = False
    return base


def train_peft(meter: Meter, model: Any, case: dict[str, Any], steps: int, compile: bool = False) -> dict[str, Any]:
    """The steps of a bare loop around a model of peft."""
    import torch

    rows, labels = batch_of(case, model.config.vocab_size)
    model.train()
    if compile:
        model.compile()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)
    meter.start()
    for _ in range(steps):
        ids = torch.tensor(rows)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor(labels)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        meter.step(loss.item())
    return meter.result()


def spawn(script: str, task: dict[str, Any], threads: int, cpu: str = "") -> dict[str, Any]:
    """What `script --worker TASK` prints last, on the cores `cpu`; what torch compiles begins with an empty cache."""
    command = [sys.executable, script, "--worker", json.dumps(task)]
    command = ["taskset", "-c", cpu, *command] if cpu else command
    with tempfile.TemporaryDirectory() as cache:
        root = str(Path(__file__).resolve().parents[1])
        places = {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": root, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def versus(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """A summary of burnish's runs over that of peft's."""
    return {
        "speed_ratio": theirs["step_cpu_seconds"] / ours["step_cpu_seconds"],
        "wall_speed_ratio": theirs["step_seconds"] / ours["step_seconds"],
        "peak_memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "steady_memory_ratio": ours["steady_peak_bytes"] / theirs["steady_peak_bytes"],
        "initial_loss_difference": abs(ours["losses"][0] - theirs["losses"][0]),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
    }
