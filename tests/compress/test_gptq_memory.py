"""Quantising a model of S bytes, and proving it, takes at most S / 4 and five layers beside what any process takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

LAYERS, WIDTH, INNER = 16, 1024, 2816
SHAPE = {"vocab_size": 80, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 64}
COMMAND = """
import sys
from pathlib import Path
from burnish import cli
status = cli.main(sys.argv[1:])
print(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


def write(folder: Path) -> Path:
    """A random Llama of 410 MB, one layer's tensors after the other's."""
    draw = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    shapes |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    named = {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (80, WIDTH), "lm_head.weight": (80, WIDTH), "model.norm.weight": (WIDTH,)}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in named.items()}
    for tensor in tensors.values():
        tensor.normal_(float(tensor.dim() == 1), 0.03, generator=draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"], eos_token_id=1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def peak(model: Path, output: Path) -> int:
    """Most resident bytes of `burnish quantize`."""
    chosen = "[{gptq: {nsamples: 2, max_length: 16}}]"
    words = [str(model), "--techniques", chosen, "--output-dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMMAND, "quantize", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_quarter_of_the_model_and_five_layers(root, tmp_path):
    base = peak(tiny.folder(root, "llama"), tmp_path / "tiny")
    (tmp_path / "large").mkdir()
    large = write(tmp_path / "large")
    size = (large / "model.safetensors").stat().st_size
    most = peak(large, tmp_path / "small") - base
    assert most <= size / 4 + 5 * size / LAYERS, f"{most >> 20} MiB of {size >> 20}"
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 0.3 * size
