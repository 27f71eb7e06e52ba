"""`burnish quantize` from the terminal."""

from __future__ import annotations

import pytest
import tiny

from burnish import chain
from burnish.cli import main
from burnish.store.checkpoint import load, save

METHODS = ["int8", "nf4", "fp4", "fp8", "int_groups", "gptq"]


def refused(capsys, words: list[str], out) -> str:
    """The one line of a command that exits with 2 and writes nothing."""
    capsys.readouterr()
    there = sorted(out.parent.iterdir())
    assert main(["quantize", *words, "--output-dir", str(out)]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and sorted(out.parent.iterdir()) == there
    return said.err


@pytest.mark.parametrize("method", METHODS)
def test_a_model_quantised_already_is_refused(root, tmp_path, capsys, method):
    save(chain.apply(load(tiny.folder(root, "llama")), ["nf4", {"lora": {"r": 2}}]), tmp_path / "small")
    said = refused(capsys, [str(tmp_path / "small"), "--method", method], tmp_path / "out")
    found = "layers.0.self_attn.q_proj is quantised already (NF4); start from the 16-bit model"
    assert said == f"burnish quantize: {tmp_path / 'small'}: {found}\n"


@pytest.mark.parametrize("told", [True, False])
def test_so_is_one_in_the_layout_of_gptq(tmp_path, capsys, told):
    """With burnish's own record beside it, and as others write it."""
    base = tiny.write(tmp_path / "base", tiny.reference("llama", hidden_size=64, intermediate_size=96))
    small = tmp_path / "small"
    save(chain.apply(load(base), [{"int_groups": {"group_size": 32}}]), small)
    assert (small / "model.safetensors").exists()
    if not told:
        (small / "burnish.json").unlink()
    assert "(Grouped); start from" in refused(capsys, [str(small), "--method", "int8"], tmp_path / "out")


def test_two_methods_for_one_projection(root, tmp_path, capsys):
    words = [str(tiny.folder(root, "llama")), "--techniques", "[{nf4: {target_modules: [q_proj, v_proj]}}, int8]"]
    assert "nf4 and int8 would both quantise layers.0.self_attn.q_proj" in refused(capsys, words, tmp_path / "out")
    words[-1] = "[{nf4: {target_modules: [q_proj]}}, {int8: {target_modules: [v_proj]}}]"
    assert main(["quantize", *words, "--output-dir", str(tmp_path / "out")]) == 0
