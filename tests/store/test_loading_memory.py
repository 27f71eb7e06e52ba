"""Loading holds a model once, and a quantised one never in 16 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf_models
import pytest
import tiny

import burnish
from burnish.store.checkpoint import load, save
from burnish.store.gguf_model import write
from burnish.store.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]

MEASURE = """
import os, sys, json
import torch
torch.set_num_threads(1)
import burnish

def memory(key):
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines[key].split()[0]) * 1024

def warm():
    for small in json.loads(sys.argv[1]):
        burnish.load(small)

warm()  # imports
ratios = []
for folder, *techniques in map(json.loads, sys.argv[2:]):
    reader, writer = os.pipe()
    if os.fork() == 0:  # a fresh high-water mark
        warm()  # the libraries' pages, which a fork leaves away
        before = memory("VmRSS")
        model = burnish.apply(burnish.load(folder, techniques=techniques), techniques)
        size = sum(p.numel() * p.element_size() for p in model.net.parameters())
        os.write(writer, json.dumps([memory("VmHWM") - before, size]).encode())
        os._exit(0)
    os.close(writer)
    peak, size = json.loads(os.read(reader, 1000) or "null")
    os.wait()
    ratios.append([peak / size, size])
print(json.dumps(ratios))
"""


def measured(small: list[Path], *loads: list[str]) -> list[tuple[float, int]]:
    """Of each [folder, *techniques], `small` ones loaded before: the most bytes that loading adds, in those of its
    parameters, and these."""
    command = [sys.executable, "-c", MEASURE, json.dumps([*map(str, small)]), *map(json.dumps, loads)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def big_model(folder: Path, family: str, **shard) -> str:
    import transformers as t

    if family == "llama":
        config = t.LlamaConfig(
            vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12
        )
    else:
        config = t.GPT2Config(vocab_size=8000, n_embd=768, n_layer=6, n_head=12, bos_token_id=1, eos_token_id=1)
    model = (t.LlamaForCausalLM if family == "llama" else t.GPT2LMHeadModel)(config)
    model.save_pretrained(folder, **shard)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_loading_holds_the_model_once(root, tmp_path):
    folders = [
        big_model(tmp_path / "single", "llama"),
        big_model(tmp_path / "sharded", "llama", max_shard_size="60MB"),
        big_model(tmp_path / "transposed", "gpt2"),
    ]
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    wanted = [*([folder] for folder in folders), [folders[0], "nf4"], [folders[2], "nf4"]]
    peaks = measured([tiny.folder(root, "llama")], *wanted)
    for (folder, *techniques), (ratio, size) in zip(wanted, peaks, strict=True):
        if techniques:  # each matrix read when it is quantised: never the whole in 32 bits
            assert size < 80e6 and size * ratio < 175e6, (folder, size, ratio)  # in 32 bits it is 219e6
            continue
        assert size > 150e6, folder
        assert 0.9 < ratio <= 1.15, (folder, ratio)


WIDTH, INNER = 768, 3072
LAYER = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # bytes of one in 16 bits
PART = {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}
SAVED = {  # name -> the technique, or a GGUF file's type
    "int8": "int8",
    "nf4": "nf4",
    "int_groups": {"int_groups": PART},
    "gptq": "int_groups",  # of every projection: saved in GPTQ's layout
    "q4_0": "q4_0",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[int, int]]:
    """Bytes of each checkpoint's tensors, and those that loading it adds at most."""
    root = tmp_path_factory.mktemp("quantised")
    (root / "large").mkdir()
    large = tiny.large_folder(root / "large", WIDTH, INNER, 400)
    save_tokenizer(gguf_models.tokenizer(), large)
    small = gguf_models.checkpoint(root / "small", "llama", hidden_size=64, intermediate_size=96)
    saved = {n: (quantised(small, n, root / f"small {n}"), quantised(large, n, root / n)) for n in SAVED}
    assert "quantization_config" in (saved["gptq"][1] / "config.json").read_text()
    assert "quantization_config" not in (saved["int_groups"][1] / "config.json").read_text()
    peaks = measured([x for x, _ in saved.values()], [str(large)], *([str(x)] for _, x in saved.values()))
    files = {"16 bits": large, **{name: path for name, (_, path) in saved.items()}}
    return {name: (nbytes(files[name]), int(ratio * size)) for name, (ratio, size) in zip(files, peaks, strict=True)}


def quantised(folder: Path, name: str, path: Path) -> Path:
    technique = SAVED[name]
    if technique == "q4_0":
        write(load(folder), path.with_suffix(".gguf"), "q4_0")
        return path.with_suffix(".gguf")
    return save(burnish.apply(load(folder, techniques=[technique]), [technique]), path)


def nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


@pytest.mark.parametrize("name", SAVED)
def test_a_quantised_checkpoint_is_loaded_as_it_is_stored(loaded, name):
    stored, most = loaded[name]
    whole = loaded["16 bits"][0]
    assert whole > 16 * LAYER and stored < 0.6 * whole
    assert 0.9 * stored < most < stored + 0.5 * LAYER, f"{most >> 20} MiB of {stored >> 20}"
    assert most < 0.65 * whole
