"""GPTQ against the paper's algorithm written plainly, layer by layer, and from the terminal."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from burnish import chain
from burnish.chain import Context, forward
from burnish.cli import main
from burnish.compress import calibration, gptq
from burnish.compress.grouped import Form, Grouped
from burnish.config import UserError
from burnish.model.example import Example
from burnish.model.linear import Dense, Unread
from burnish.model.surgery import linears
from burnish.native import plane
from burnish.store.checkpoint import load, save

SMALL = {"nsamples": 8, "max_length": 16}


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int, columns: int) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=draw(1)) @ torch.randn(columns, columns, generator=draw(2))
    x[:, 7] = 0  # an input that is always 0
    return x


def by_the_paper(dense: torch.Tensor, gram: torch.Tensor, config: gptq.Config) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 in float64, one column at a time, with the inverse's factor."""
    form, w, h = config.form(""), dense.double().clone(), gram.double().clone()
    dead = h.diag() == 0
    h.diagonal()[dead], w[:, dead] = 1, 0
    h.diagonal().add_(config.damp_percent * h.diag().mean())
    order = h.diag().argsort(stable=True).flip(0) if config.desc_act else torch.arange(len(h))
    before, size = w.clone(), form.size(len(h))
    w, h, out = w[:, order], h[order][:, order], torch.empty_like(w)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for i, column in enumerate(order.tolist()):
        if config.static_groups:
            part = slice(column // size * size, (column // size + 1) * size)
            scale, zero = form.grid(before[:, part].float())
        elif i % size == 0:
            scale, zero = form.grid(w[:, i : i + size].float())
        out[:, column] = (form.codes(w[:, i], scale.double(), zero.double()) - zero) * scale
        w[:, i:] -= ((w[:, i] - out[:, column]) / factor[i, i])[:, None] * factor[i, i:]
    return out


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("group_size", [32, -1, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_codes_are_those_of_the_papers_algorithm(monkeypatch, kernel, group_size, bits, desc_act, static):
    if kernel and plane.library() is None:
        pytest.skip("no compiler")
    if not kernel:
        monkeypatch.setattr(plane, "library", lambda: None)
    x, dense = correlated(400, 100), torch.randn(40, 100, generator=draw(3))
    monkeypatch.setattr(gptq, "gram_matrix", lambda *_: x.t() @ x)
    config = gptq.Config(bits, group_size, bits in (4, 8), desc_act, static)
    factor, order = gptq.factorised(None, [], None, config, "")  # type: ignore[arg-type]
    weight, error = gptq.quantise(dense, factor, order, config.form(""), static)
    got, want = weight.dequantize(), by_the_paper(dense, x.t() @ x, config).float()
    assert (abs(got - want) < 1e-4).float().mean() > 0.995  # sums in float32 may fall to the other side of a border

    def loss(q: torch.Tensor) -> float:
        return float((x @ (q - dense).t()).square().sum() / (x @ dense.t()).square().sum())

    assert loss(got) == pytest.approx(loss(want), rel=0.02)
    assert loss(got) < 0.8 * loss(config.form("").round(dense).dequantize())
    assert error == pytest.approx(loss(got), rel=0.15)  # which has the dampening in it


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt2", "falcon", "bert", "t5"])
def test_layers_are_given_what_the_quantised_ones_before_them_give(root, family, monkeypatch):
    """The states with which `in_turn` leaves the last layer are the network's."""
    model, context = load(tiny.folder(root, family)), Context()
    data = calibration.batches(model, context, 3, 12, "gptq")
    seen = []
    with calibration.computing(model.net):
        for layer, calls in calibration.in_turn(model, data, "gptq"):
            for part in layer.modules():
                if isinstance(getattr(part, "weight", None), Dense):
                    part.weight = Form(4, -1).round(part.weight.dense)
            seen.append(calls)
    stacks = [model.net, *([model.net.decoder] if model.spec.paired else [])]
    for stack in stacks:
        handed = []
        handle = stack.layers[-1].register_forward_hook(lambda _, args, out, handed=handed: handed.append(out))
        with torch.no_grad():
            for batch in data:
                calibration.feed(model.net, batch)
        handle.remove()
        last = seen[len(stack.layers) - 1 if stack is model.net else -1]
        for call, want in zip(last, handed, strict=True):
            torch.testing.assert_close(call.x, want, atol=1e-5, rtol=1e-5)


def test_stages_are_what_reads_the_same(root):
    model = load(tiny.folder(root, "llama"))
    data = calibration.batches(model, Context(), 2, 8, "gptq")
    with calibration.computing(model.net):
        layer, calls = next(calibration.in_turn(model, data, "gptq"))
        found = [[name.split(".")[1] for name, _ in stage] for stage in calibration.stages(layer, calls[0])]
    assert found == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_outputs_are_nearer_than_rounded_ones(root):
    base, batch = load(tiny.folder(root, "llama")), {"input_ids": torch.randint(6, 50, (4, 40), generator=draw(4))}
    data = [{"input_ids": torch.randint(6, 50, (8, 40), generator=draw(5))}]

    def error(technique) -> float:
        model = chain.apply(load(tiny.folder(root, "llama"), techniques=[technique]), [technique], Context(data))
        with torch.no_grad():
            return float((forward(model, batch) - forward(base, batch)).norm())

    options = {"bits": 3, "group_size": 16}
    assert error({"gptq": options}) < 0.75 * error({"int_groups": options})


def test_weights_are_read_one_layer_at_a_time(root, monkeypatch):
    model, most = load(tiny.folder(root, "llama"), techniques=["gptq"]), []
    assert all(isinstance(linear.weight, Unread) for _, linear in linears(model.net))
    quantise = gptq.quantise

    def counted(*given):
        most.append(sum(isinstance(x.weight, Unread) and x.weight.held for _, x in linears(model.net)))
        return quantise(*given)

    monkeypatch.setattr(gptq, "quantise", counted)
    chain.apply(model, [{"gptq": SMALL}])
    assert max(most) == 7 and all(isinstance(linear.weight, Grouped) for _, linear in linears(model.net))
    same = chain.apply(load(tiny.folder(root, "llama")), [{"gptq": SMALL}])
    assert all(map(torch.equal, model.net.parameters(), same.net.parameters()))


def test_states_that_wait_come_back_as_they_were(monkeypatch):
    file, draws = calibration.scratch(), draw(6)
    given = [torch.randn(3, 5, generator=draws).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    given.append(given[0].t())
    away = [calibration.Away(tensor, file) for tensor in given]
    assert all(map(torch.equal, [each.back() for each in reversed(away)], reversed(given)))

    class Full:
        def seek(self, *_):
            return 0

        def write(self, _):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="60 bytes of calibration states cannot be written: No space left"):
        calibration.Away(given[0], Full())  # type: ignore[arg-type]


def test_examples_calibrate_and_progress_is_told(root):
    told: list[dict] = []
    examples = [Example([6 + i % 40] * 9, [-100] * 9) for i in range(4)]
    model = load(tiny.folder(root, "gpt2"))
    assert [len(b["input_ids"]) for b in calibration.batches(model, Context(examples=examples), 99, 12, "gptq")] == [3]
    chain.apply(model, [{"gptq": SMALL}], Context(examples=examples, report=told.append))
    assert [record["layer"] for record in told] == [path for path, _ in linears(model.net)]
    assert all(0 <= record["error"] < 0.1 for record in told)


def refused(root, message: str, options=None, context=None, prepare=lambda model: None, before=()) -> None:
    model = chain.apply(load(tiny.folder(root, "llama")), before) if before else load(tiny.folder(root, "llama"))
    prepare(model)
    with pytest.raises(UserError, match=message) as caught:
        chain.apply(model, [{"gptq": {**SMALL, **(options or {})}}], context or Context())
    assert "\n" not in str(caught.value)


def test_bad_input(root, monkeypatch):
    short = Context(examples=[Example([7] * 5, [-100] * 5)])
    refused(root, "the calibration text has 5 tokens, fewer than one row of 16", context=short)
    refused(root, "layers.0.self_attn.q_proj is stored as NF4 already", before=["nf4"])
    refused(root, "damp_percent is 0.0", {"damp_percent": 0.0})
    refused(root, "nsamples must be at least 1", {"nsamples": 0})

    def spoil(model) -> None:
        with torch.no_grad():
            model.net.layers[1].input_layernorm.weight[3] = float("nan")

    refused(root, "the activations that layers.1.self_attn.q_proj reads are not finite", prepare=spoil)
    tried = []

    def singular(layer, calls, linear):
        tried.append(linear)
        return -torch.eye(linear.in_features)

    monkeypatch.setattr(gptq, "gram_matrix", singular)
    refused(root, "layers.0.self_attn.q_proj reads depend on each other too closely; raise damp_percent above 0.01")
    assert len(tried) == gptq.TRIES


def test_the_dampening_is_raised_where_it_must(monkeypatch):
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05
    monkeypatch.setattr(gptq, "gram_matrix", lambda *_: gram.clone())
    factor, _ = gptq.factorised(None, [], None, gptq.Config(desc_act=False), "")  # type: ignore[arg-type]
    torch.testing.assert_close((factor @ factor.t()).diagonal(), torch.full((8,), 1.1))


def test_from_the_terminal(root, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the cat sees a dog . the bird runs ."}\n' * 20)
    given = ["quantize", str(tiny.folder(root, "llama")), "--data", str(text)]
    chosen = "[{gptq: {bits: 3, group_size: 16, nsamples: 4, max_length: 16}}]"
    assert main([*given, "--techniques", chosen, "--output-dir", str(tmp_path / "out"), "--json"]) == 0
    *layers, total = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = load(tmp_path / "out")
    assert [record["layer"] for record in layers] == [path for path, _ in linears(model.net)]
    assert total["after"] < total["before"] and model.chain[0].config.bits == 3
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "the cat"}\n')
    assert (
        main(["quantize", given[1], "--data", str(short), "--method", "gptq", "--output-dir", str(tmp_path / "no")])
        == 2
    )
    assert "fewer than one row" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["quantize", str(tmp_path / "out"), "--method", "gptq", "--output-dir", str(tmp_path / "no")]) == 2
    assert "q_proj is quantised already (int_groups)" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["quantize", given[1], "--data", str(text), "--output-dir", str(tmp_path / "no")]) == 2
    assert "data: none of nf4 calibrates" in capsys.readouterr().err


def test_saved_and_loaded_again(root, tmp_path):
    """In an order of their own, with LoRA behind them, and into the layout of GPTQ where it holds them."""
    options = {**SMALL, "static_groups": False, "group_size": 16, "sym": False}
    model = chain.apply(load(tiny.folder(root, "llama")), [{"gptq": options}, {"lora": {"r": 2}}])
    batch = {"input_ids": torch.arange(6, 20)[None]}
    again = load(save(model, tmp_path))
    assert chain.describe(again) == chain.describe(model)
    with torch.no_grad():
        assert torch.equal(forward(again, batch), forward(model, batch))
