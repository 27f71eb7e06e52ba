"""`burnish quantize` from the terminal."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from burnish import chain
from burnish.chain import Context
from burnish.cli import main
from burnish.compress.grouped import Form
from burnish.compress.int8 import Int8
from burnish.compress.nf4 import NF4
from burnish.model import surgery
from burnish.model.surgery import linears
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
    assert "(int_groups); start from" in refused(capsys, [str(small), "--method", "int8"], tmp_path / "out")


def test_two_methods_for_one_projection(root, tmp_path, capsys):
    words = [str(tiny.folder(root, "llama")), "--techniques", "[{nf4: {target_modules: [q_proj, v_proj]}}, int8]"]
    assert "nf4 and int8 would both quantise layers.0.self_attn.q_proj" in refused(capsys, words, tmp_path / "out")
    words[-1] = "[{nf4: {target_modules: [q_proj]}}, {int8: {target_modules: [v_proj]}}]"
    assert main(["quantize", *words, "--output-dir", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gptq", "--techniques", "[int8]"], "method: stands instead of techniques"),
        (["--techniques", "[gptq, awq]"], "awq scales weights that gptq has rounded; put awq before it"),
        (["--techniques", "[lora]"], "none of lora quantises"),
        (["--techniques", "[lora, qat]"], "none of lora, qat quantises"),
        (["--techniques", "[{gptq: {bits: 3}}]", "--target-size", "60%"], "chooses gptq's bits itself"),
        (["--techniques", "[{int_groups: {bits_pattern: {q_proj: 3}}}]", "--target-size", "60%"], "leave bits and"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(tmp_path, capsys, words, message):
    assert message in refused(capsys, ["nowhere", *words], tmp_path / "out")


@pytest.mark.parametrize("techniques", ["[nf4]", "[{gptq: {nsamples: 2, max_length: 12}}]"])
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_models_that_are_no_decoders(root, tmp_path, capsys, family, techniques):
    """Their weights are in their files still while the proof listens to the model of before."""
    words = ["quantize", str(tiny.folder(root, family)), "--techniques", techniques, "--proof", "true"]
    assert main([*words, "--output-dir", str(tmp_path / "small")]) == 0
    assert "proof: KL" in capsys.readouterr().out
    assert load(tmp_path / "small").chain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_json", [False, True])
def test_each_projections_error_is_told_and_kept(root, tmp_path, capsys, method, as_json):
    """In its turn; without calibration it is the share of the matrix's own power that is lost."""
    folder, out = tiny.folder(root, "llama"), tmp_path / "out"
    options = {"gptq": {"nsamples": 4, "max_length": 16}, "int_groups": {"group_size": 16}}.get(method, {})
    words = ["quantize", str(folder), "--techniques", json.dumps([{method: options}]), "--output-dir", str(out)]
    assert main([*words, *(["--json"] if as_json else [])]) == 0
    told, (before, after) = capsys.readouterr(), (dict(linears(load(place).net)) for place in (folder, out))
    errors = json.loads((out / "proof.json").read_text())["errors"]
    if as_json:
        *records, total = map(json.loads, told.out.splitlines())
        assert {record["layer"]: record["error"] for record in records} == errors == total["errors"]
    else:
        shown = [f"{n}/14  {path}  error {100 * error:.3g}%" for n, (path, error) in enumerate(errors.items(), 1)]
        assert told.err.splitlines()[-14:] == shown
    assert list(errors) == list(before) == list(after)
    for path, error in errors.items():
        known, found = (x[path].weight.dequantize().double() for x in (before, after))
        lost = float((found - known).square().sum() / known.square().sum())
        assert 0 < lost < 0.05 and error == pytest.approx(lost, rel=1 if method == "gptq" else 1e-4)


@pytest.mark.parametrize("as_json", [False, True])
def test_so_are_the_errors_of_scaling_before_and_after(root, tmp_path, capsys, as_json):
    """Of what reads a norm, or linearly a projection, in its turn, and once more when it is stored."""
    options, out = "{nsamples: 4, max_length: 16}", tmp_path / "out"
    chosen = f"[{{smoothquant: {options}}}, {{awq: {options}}}, {{int_groups: {{group_size: 16}}}}]"
    words = ["quantize", str(tiny.folder(root, "llama")), "--techniques", chosen, "--output-dir", str(out)]
    assert main([*words, *(["--json"] if as_json else [])]) == 0
    told, proof = capsys.readouterr(), json.loads((out / "proof.json").read_text())
    scaled = proof["scaled"]
    assert [len(scaled[name]) for name in ("smoothquant", "awq")] == [10, 12] and len(proof["errors"]) == 14
    if as_json:
        *records, total = map(json.loads, told.out.splitlines())
        assert total["scaled"] == scaled
        assert [r["technique"] for r in records if "scaled" in r] == ["smoothquant"] * 10 + ["awq"] * 12
        return
    shown = []
    for name, own in scaled.items():
        for path, (before, after) in own.items():
            layer = int(path.split(".")[1]) + 1
            shown.append(f"{name}, layer {layer}/2  {path}  error {100 * before:.3g}% -> {100 * after:.3g}%")
    assert told.err.splitlines()[-36:-14] == shown


def test_errors_of_matrices_that_are_taken_in_parts(monkeypatch):
    dense = torch.randn(600, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for made in (Int8.quantize(dense), NF4.quantize(dense), Form(4, 32).round(dense), Form(3, 32).round(dense)):
        want = float((made.dequantize() - dense.float()).square().sum() / dense.float().square().sum())
        for rows in (256, 512):
            monkeypatch.setattr(surgery, "ROWS", rows)
            assert surgery.lost(made, dense) == pytest.approx(want, rel=1e-5)


def test_errors_cost_nothing_where_nobody_asks(root, monkeypatch):
    monkeypatch.setattr(surgery, "lost", None)
    told: list[dict] = []
    chain.apply(load(tiny.folder(root, "llama")), ["int8"], Context(report=told.append))
    assert not told


@pytest.mark.parametrize("given", [True, False])
def test_the_card_tells_what_calibrated(root, tmp_path, given):
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text('{"text": "the cat sees a dog . the bird runs ."}\n' * 99)
    calibrated = "[{awq: {nsamples: 3, max_length: 12}}, {gptq: {nsamples: 4, max_length: 16}}]"
    words = ["quantize", str(tiny.folder(root, "llama")), "--techniques", calibrated, "--target-size", "60%"]
    assert main([*words, *(["--data", str(text)] if given else []), "--output-dir", str(out)]) == 0
    what = text if given else "the built-in sample"
    lines = (out / "README.md").read_text().splitlines()
    for who, size in (("the choice of bits", (32, 128)), ("awq", (3, 12)), ("gptq", (4, 16))):
        assert f"calibration of {who}: {what}, at most {size[0]} rows of {size[1]} tokens" in lines
    plain = tmp_path / "plain"
    assert main([*words[:2], "--method", "int8", "--output-dir", str(plain)]) == 0
    assert "calibration" not in (plain / "README.md").read_text()
