"""A model four times as large as the memory that it may take answers as the plain one does, seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from burnish import load
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate

SHAPE = {"vocab_size": 80, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16}
SHAPE |= {"num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 64}
CGROUPS = Path("/sys/fs/cgroup")
COMMAND = """
import sys
from pathlib import Path
from burnish import cli
status = cli.main(sys.argv[1:])
print(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A random Llama of 300 MB."""
    folder = tmp_path_factory.mktemp("large")
    draw = torch.Generator().manual_seed(0)
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    layers = range(SHAPE["num_hidden_layers"])
    named = {f"model.layers.{n}.{name}.weight": shape for n in layers for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (80, width), "lm_head.weight": (80, width), "model.norm.weight": (width,)}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in named.items()}
    for tensor in tensors.values():
        tensor.normal_(float(tensor.dim() == 1), 0.03, generator=draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"], eos_token_id=1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def answer(model: Path, *flags: str, group: Path | None = None) -> tuple[int, list[int], int]:
    """Exit status, tokens and most resident bytes of `burnish generate`, in a group of processes."""
    words = [str(model), "--prompt", "the cat sees", "--max_new_tokens", "3", "--json", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "generate", *words],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=join,  # noqa: PLW1509  nothing else runs here
    )
    if done.returncode:
        return done.returncode, [], 0
    reply, peak = done.stdout.splitlines()
    return 0, json.loads(reply)["ids"], int(peak) * 1024


@pytest.fixture
def group() -> Iterator[Path]:
    """A new memory cgroup, of version 2 or 1."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    version_2 = next((CGROUPS / path.strip("/") for _, names, path in own if not names), CGROUPS)
    for parent in (version_2, CGROUPS / "memory"):
        found = parent / f"burnish-test-{os.getpid()}"
        try:
            found.mkdir()
        except OSError:
            continue
        if limit_of(found) is not None:
            yield found
            found.rmdir()
            return
        found.rmdir()
    pytest.skip("no memory cgroup can be made here, in which the process would be confined")


def limit_of(group: Path) -> Path | None:
    files = [group / name for name in ("memory.max", "memory.limit_in_bytes")]
    return next((file for file in files if os.access(file, os.W_OK)), None)


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_a_model_four_times_the_limit_gives_the_same_tokens(large, root, group):
    """The limit is what the process takes anyway and a quarter of the model; the cgroup kills what takes more."""
    (plain,) = generate(load(large), ["the cat sees"], GenerationConfig(max_new_tokens=3))
    base = answer(tiny.folder(root, "llama"))[2]
    quarter = (large / "model.safetensors").stat().st_size // 4
    file = limit_of(group)
    assert file is not None
    file.write_text(str(base + quarter))
    assert answer(large, group=group)[0] == -9
    status, tokens, peak = answer(large, "--memory-limit", str(base + quarter), group=group)
    assert status == 0 and tokens == plain.ids
    assert base < peak <= base + quarter
