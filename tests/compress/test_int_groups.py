"""Weights in groups: their grids, their bytes, their products, and the checkpoints that others read."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from burnish import chain
from burnish.chain import forward
from burnish.compress.grouped import BITS, Form, Grouped, pack, unpack
from burnish.config import UserError
from burnish.model.surgery import linears
from burnish.native import products
from burnish.store import gptq_layout
from burnish.store.checkpoint import load, save

BATCH = {"input_ids": torch.arange(6, 20)[None]}
WIDE = {"hidden_size": 64, "intermediate_size": 96}


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) + 0.3


@torch.no_grad()
def states(model) -> torch.Tensor:
    return forward(model, BATCH)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose projections the layout of GPTQ can hold."""
    return tiny.write(tmp_path_factory.mktemp("wide"), tiny.reference("llama", **WIDE))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 5, 36, 64, 100])
def test_codes_are_packed_in_their_bits(bits, columns):
    codes = torch.randint(0, 2**bits, (7, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert packed.shape[1] == -(-columns // 8) * bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, -1, 256])
def test_rounding_is_to_the_nearest_of_each_groups_grid(bits, sym, group_size):
    """Against each group for itself, in plain words; the last group is shorter."""
    dense = matrix(6, 72)
    weight = Form(bits, group_size, sym).round(dense)
    got, top = weight.dequantize(), 2**bits - 1
    size = 72 if group_size in (-1, 256) else group_size
    for row in range(6):
        for start in range(0, 72, size):
            group = dense[row, start : start + size]
            low, high = min(float(group.min()), 0), max(float(group.max()), 0)
            if sym:
                low, high = -max(-low, high), max(-low, high)
            scale = float(torch.tensor((high - low) / top).half())
            zero = 2 ** (bits - 1) if sym else round(-low / scale)
            levels = torch.tensor([(q - zero) * scale for q in range(top + 1)])
            best = (group[:, None] - levels).abs().amin(1)
            torch.testing.assert_close((group - got[row, start : start + size]).abs(), best, atol=1e-6, rtol=1e-5)


def test_bits_a_weight():
    weight = Form(4, 128, True).round(matrix(256, 1024))
    assert 8 * weight.nbytes / (256 * 1024) == 4 + 16 / 128
    assert 8 * Form(2, 64, False).round(matrix(256, 1024)).nbytes / (256 * 1024) == 2 + 24 / 64


@pytest.mark.parametrize("form", [Form(4, 32), Form(4, 64, False), Form(3, 32, False), Form(2, -1), Form(8, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_and_its_gradient_equal_the_expanded_matrix(form, dtype):
    weight, bias = form.round(matrix(48, 128)), matrix(1, 48)[0]
    for tokens in (1, 7, 40):
        x = matrix(tokens, 128).to(dtype).requires_grad_()
        want = torch.nn.functional.linear(x, weight.dequantize().to(dtype), bias.to(dtype))
        close = {"atol": 2e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.03}
        torch.testing.assert_close(weight.matmul(x, bias), want, **close)
        with torch.no_grad():
            torch.testing.assert_close(weight.matmul(x, bias), want, **close)
        upstream = matrix(tokens, 48).to(dtype)
        (got,) = torch.autograd.grad(weight.matmul(x, bias), x, upstream)
        torch.testing.assert_close(got, torch.autograd.grad(want, x, upstream)[0], **close)


def test_four_bits_are_multiplied_as_they_are_stored(monkeypatch):
    if products.library() is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(Grouped, "expand", lambda *_: pytest.fail("the matrix was expanded"))
    with torch.no_grad():
        for form in (Form(4, 32), Form(4, -1, False)):
            assert form.round(matrix(8, 128)).matmul(matrix(3, 128)).shape == (3, 8)


@pytest.mark.parametrize("form", [Form(4, 32), Form(3, 64, False), Form(4, -1), Form(8, -1, False)])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_the_parts_of_the_whole(form, dim):
    weight = form.round(matrix(192, 192))
    whole = weight.dequantize()
    for spans in ([(0, 64)], [(128, 192), (0, 64)]):
        part = weight.shard(dim, spans)
        assert torch.equal(part.dequantize(), torch.cat([whole.narrow(dim, a, b - a) for a, b in spans], dim))
    if dim and form.group_size > 0:
        with pytest.raises(UserError, match="would cut its groups"):
            weight.shard(1, [(0, 16)])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 5}, "bits is 5; choose one of 2, 3, 4, 8"), ({"group_size": 0}, "group_size is 0; give a positive")],
)
def test_a_form_that_is_none(root, options, message):
    for name in ("int_groups", "gptq"):
        with pytest.raises(UserError, match=message):
            chain.apply(load(tiny.folder(root, "llama")), {name: options})


def reference_weight(tensors: dict[str, torch.Tensor], name: str, bits: int, version: int) -> torch.Tensor:
    """(out, in) of a projection in GPTQ's layout, bit by bit, independent of burnish's reader."""

    def stream(words: torch.Tensor) -> torch.Tensor:  # (n words, m) -> (n * 32 / bits, m)
        each = torch.stack([(words.long() >> bit) & 1 for bit in range(32)], 1).flatten(0, 1)
        return sum(each[bit::bits] << bit for bit in range(bits))

    codes, zeros = stream(tensors[f"{name}.qweight"]), stream(tensors[f"{name}.qzeros"].t()).t()
    groups, scales = tensors[f"{name}.g_idx"].long(), tensors[f"{name}.scales"].float()
    zeros = zeros + (version == 1)
    return ((codes - zeros[groups]) * scales[groups]).t()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_a_saved_folder_is_in_the_layout_of_gptq(wide, tmp_path, bits, sym):
    model = chain.apply(load(wide), {"int_groups": {"bits": bits, "sym": sym, "group_size": 32}})
    save(model, tmp_path)
    assert not (tmp_path / "burnish.safetensors").exists()
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["bits"], told["group_size"], told["sym"]) == ("gptq", bits, 32, sym)
    tensors = load_file(tmp_path / "model.safetensors")
    for path, linear in linears(model.net):
        found = reference_weight(tensors, f"model.{path}", bits, 1 if sym else 2)
        torch.testing.assert_close(found, linear.weight.dequantize(), atol=1e-6, rtol=0)
    again = load(tmp_path)
    assert torch.equal(states(again), states(model)) and chain.describe(again) == chain.describe(model)


def test_groups_that_the_layout_has_no_kernels_for_are_saved_in_burnishs_form(wide, tmp_path):
    save(chain.apply(load(wide), {"int_groups": {"group_size": 48}}), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_a_folder_of_others_is_read(wide, tmp_path, form):
    """Random codes, zero points and groups in another order, and a bias of zeros where the model has none."""
    draw = torch.Generator().manual_seed(0)
    save(chain.apply(load(wide), {"int_groups": {"bits": 3, "sym": False, "group_size": 32}}), tmp_path)
    (tmp_path / "burnish.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=draw)]
        tensors[name.replace("g_idx", "bias")] = torch.zeros(tensors[name.replace("g_idx", "scales")].shape[1])
    if form == "gptq":  # no zero point of 0, which this layout cannot tell
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            groups, rows = tensors[name.replace("qzeros", "scales")].shape
            values = torch.randint(0, 7, (rows, groups), dtype=torch.uint8, generator=draw)
            tensors[name] = gptq_layout.to_words(values, 3).t().contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": form, "desc_act": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    for path, linear in linears(model.net):
        want = reference_weight(tensors, f"model.{path}", 3, 1 if form == "gptq" else 2)
        torch.testing.assert_close(linear.weight.dequantize(), want, atol=1e-6, rtol=0)
        x = matrix(3, linear.in_features)
        torch.testing.assert_close(linear.weight.matmul(x), x @ want.t(), atol=1e-4, rtol=1e-4)
    save(model, tmp_path / "again")
    assert torch.equal(states(load(tmp_path / "again")), states(model))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in again if name.endswith(("qweight", "g_idx")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq' is not read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({"dynamic": {"x": {"bits": 8, "sym": False}}}, "dynamic: x: other settings than bits"),
        ({"dynamic": {"-:x": {}}}, "dynamic: -:x"),
        ({"dynamic": {"x": {"bits": 5}}}, "bits 5 are not read"),
        ({"bits": 6}, "bits 6 are not read"),
        ({"group_size": 16}, "are not of 16 inputs each"),
    ],
)
def test_other_layouts_are_refused(wide, tmp_path, change, message):
    save(chain.apply(load(wide), {"int_groups": {"group_size": 32}}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load(tmp_path)
