"""T5 and mT5 against transformers and peft: logits, caches, generation, training, and the encoder alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import burnish
from burnish import chain
from burnish.bench.latency import LatencyConfig, latency
from burnish.bench.measure import measure
from burnish.chain import Model, forward
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.generate import GenerationConfig, generate
from burnish.engine.loss import loss_sum
from burnish.engine.order import collated
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import IGNORE, Example
from burnish.model.families import read_spec
from burnish.model.positions import relative_buckets
from burnish.model.seq2seq import CrossAttention
from burnish.plan import plan
from burnish.store.checkpoint import save

PROMPTS = ["the cat", "where is the big red dog ?", "who sees", "is rome big ?"]
VARIANTS = {  # name -> (family, changes of the config, whether the head is its own)
    "t5": ("t5", {}, False),
    "v1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1}, True),
    "mt5": ("mt5", {}, True),
    "mt5 tied": ("mt5", {"feed_forward_proj": "gated-silu"}, False),
}


def examples(sizes=((20, 5), (9, 9), (4, 2)), seed: int = 0) -> list[Example]:
    """Pairs of a source and a target of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    rows = [(source, torch.randint(6, 50, (source + target,), generator=draw).tolist()) for source, target in sizes]
    return [Example(ids, [IGNORE] * source + ids[source:]) for source, ids in rows]


def reference(variant: str):
    family, changes, own_head = VARIANTS[variant]
    model = tiny.reference(family, **changes)
    if own_head:
        model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.2)
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    return model


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path):
    """(transformers' model, burnish's) of a variant."""
    model = reference(request.param)
    loaded = burnish.load(tiny.write(tmp_path / "base", model))
    assert loaded.spec.tied != VARIANTS[request.param][2]
    return model, loaded


@torch.no_grad()
def theirs(model, batch) -> torch.Tensor:
    return model(
        input_ids=batch["source_input_ids"],
        attention_mask=batch["source_attention_mask"].long(),
        decoder_input_ids=batch["input_ids"],
        decoder_attention_mask=batch["attention_mask"].long(),
    ).logits


@torch.no_grad()
def ours(model: Model, batch) -> torch.Tensor:
    return model.net.logits(forward(model, batch))


def assert_same(model: Model, reference, side: str = "right") -> None:
    batch = collated(model, examples(), side)
    real = batch["attention_mask"]
    torch.testing.assert_close(ours(model, batch)[real], theirs(reference, batch)[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers(pair, side):
    assert_same(pair[1], pair[0], side)


def test_saved_folder_reloads_in_transformers(pair, tmp_path):
    saved = save(pair[1], tmp_path / "saved")
    again, info = type(pair[0]).from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(pair[1], again.eval())
    assert_same(burnish.load(saved), pair[0])


def test_what_transformers_writes_loads(pair, tmp_path):
    type(pair[0]).from_pretrained(save(pair[1], tmp_path / "saved")).save_pretrained(tmp_path / "theirs")
    tiny.tokenizer("seq2seq").save_pretrained(tmp_path / "theirs")
    assert_same(burnish.load(tmp_path / "theirs"), pair[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_equals_one_forward(pair, side):
    reference, model = pair
    batch = collated(model, examples(), side)
    sources = {name: batch.pop(name) for name in list(batch) if name.startswith("source_")}
    width = batch["input_ids"].shape[1]
    cache = model.net.new_cache(3, width)
    pieces = []
    for start, end in zip((0, 4, 5, 6), (4, 5, 6, width), strict=True):
        columns = {name: t[:, start:end] for name, t in batch.items()} | (sources if start == 0 else {})
        with torch.no_grad():
            pieces.append(model.net.logits(forward(model, columns, cache)))
    real = batch["attention_mask"]
    want = theirs(reference, {**batch, **sources})
    torch.testing.assert_close(torch.cat(pieces, 1)[real], want[real], atol=1e-4, rtol=0)


def test_buckets_equal_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    for count, far in ((32, 128), (8, 12)):
        for kind in ("encoder", "decoder"):
            spec = replace(read_spec(dict(model_type="t5", **tiny.PAIRED)), relative_buckets=count, kind=kind)
            spec = replace(spec, relative_distance=far)
            want = T5Attention._relative_position_bucket(distance, kind == "encoder", count, far)
            assert torch.equal(relative_buckets(spec, distance), want)


def test_generation_equals_transformers(pair):
    reference, model = pair
    greedy = GenerationConfig(max_new_tokens=8, min_new_tokens=4)
    for prompt, done in zip(PROMPTS, generate(model, PROMPTS, greedy), strict=True):
        x = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        assert x[0, -1] == 1  # the source ends as T5's tokenizer ends it
        want = reference.generate(x, max_new_tokens=8, min_new_tokens=4, do_sample=False)[0, 1:].tolist()
        assert done.ids == want[: len(done.ids)] and len(done.ids) in (len(want), 8)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_batch_gives_each_row_what_it_gets_alone(tmp_path, sampled):
    model = burnish.load(tiny.write(tmp_path, reference("v1.1")))
    settings = GenerationConfig(max_new_tokens=9, do_sample=sampled, top_k=20 if sampled else 0)
    together = generate(model, PROMPTS, settings)
    assert [generate(model, [prompt], settings)[0] for prompt in PROMPTS] == together
    assert len({tuple(done.ids) for done in together}) > 1


def test_the_source_is_read_once(root, monkeypatch):
    model, read = burnish.load(tiny.folder(root, "t5")), []
    plain = CrossAttention.read
    monkeypatch.setattr(CrossAttention, "read", lambda self, *given: read.append(self.layer) or plain(self, *given))
    generate(model, ["the cat"], GenerationConfig(max_new_tokens=6, min_new_tokens=6))
    assert read == [0, 1]


def test_loss_equals_transformers(pair):
    reference, model = pair
    batch = collated(model, examples())
    labels = batch["labels"][:, 1:].contiguous()
    given = {"input_ids": batch["source_input_ids"], "attention_mask": batch["source_attention_mask"].long()}
    want = reference(**given, labels=labels).loss
    loss, count = loss_sum(chain.apply(model, ["full"]), batch)
    assert count == int((labels != IGNORE).sum()) == 16
    torch.testing.assert_close(loss / count, want, atol=1e-4, rtol=0)
    want.backward()
    (loss / count).backward()
    own, others = dict(model.net.named_parameters()), dict(reference.named_parameters())
    for name in own:
        plain = name.removesuffix(".dense")
        other = others[model.net.layout.tensors[plain]]
        torch.testing.assert_close(own[name].grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    table = [(f"{a} {b} ?", c) for a in ("the", "a", "big") for b, c in (("cat", "red blue"), ("dog", "yes"))]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in table))
    return path


@pytest.mark.parametrize("techniques", ["[lora]", "[full]", "[nf4, {lora: {target_modules: all-linear}}]"])
def test_tune_and_evaluate(root, tmp_path, capsys, techniques):
    data, out = str(rows(tmp_path)), str(tmp_path / "out")
    options = ["--data", data, "--output-dir", out, "--techniques", techniques, "--learning-rate", "0.02"]
    options += ["--max-steps", "60", "--per-device-train-batch-size", "6"]
    assert main(["tune", str(tiny.folder(root, "t5")), *options]) == 0
    model = burnish.load(out)
    assert measure(model, {"name": "rows", "data": data, "eval_data": data}) == 1.0
    answers = generate(model, ["the cat ?", "big dog ?"], GenerationConfig(max_new_tokens=6))
    assert [answer.text for answer in answers] == ["red blue", "yes"]
    assert {answer.finish_reason for answer in answers} == {"eos"}
    capsys.readouterr()
    assert main(["generate", out, "--prompt", "a dog ?"]) == 0
    assert capsys.readouterr().out == "yes\n"
    assert main(["eval", out, "--data", data, "--metric", "perplexity"]) == 0


def test_accumulated_steps_are_the_same_step(root):
    def losses(size: int, steps: int) -> torch.Tensor:
        model = chain.apply(burnish.load(tiny.folder(root, "t5")), ["full"])
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        config = TrainConfig(max_steps=4, learning_rate=1e-3, logging_steps=1, **settings)
        return torch.tensor(train(model, examples(((9, 5), (3, 9), (4, 2), (7, 7))), config).losses)

    torch.testing.assert_close(losses(4, 1), losses(1, 4), atol=1e-3, rtol=0)


def test_checkpointing_and_bfloat16_train(root):
    model = chain.apply(burnish.load(tiny.folder(root, "mt5")), ["full"])
    batch = collated(model, examples())

    def gradients(**settings) -> torch.Tensor:
        for name, value in settings.items():
            setattr(model.net, name, value)
        model.net.train().zero_grad()
        loss_sum(model, batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.trainable().values()])

    want = gradients()
    torch.testing.assert_close(gradients(gradient_checkpointing=True), want)
    rounded = gradients(gradient_checkpointing=False, compute_dtype=torch.bfloat16)
    assert (rounded - want).norm() < 0.1 * want.norm()


def test_lora_goes_to_peft_and_back(root, tmp_path):
    folder = tiny.folder(root, "t5")
    model = chain.apply(burnish.load(folder), [{"lora": {"r": 4}}])
    paths = set(model.chain[0].config.target_modules)
    stacks = ["layers.{i}.self_attn", "decoder.layers.{i}.self_attn", "decoder.layers.{i}.cross_attn"]
    assert paths == {f"{s.format(i=i)}.{x}_proj" for s in stacks for i in range(2) for x in "qv"}
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape)
    saved = save(model, tmp_path / "adapter")
    written = json.loads((saved / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_2_SEQ_LM"
    assert "encoder.block.0.layer.0.SelfAttention.q" in written["target_modules"]
    assert_same(model, peft.PeftModel.from_pretrained(tiny.reference("t5"), saved).eval())
    config = peft.LoraConfig(r=4, target_modules=["q", "v", "wo"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    other = peft.get_peft_model(tiny.reference("t5"), config).eval()
    other.peft_config["default"].base_model_name_or_path = str(folder)
    other.save_pretrained(tmp_path / "peft")
    assert_same(burnish.load(tmp_path / "peft"), other)


@pytest.mark.parametrize(
    ("techniques", "config"),
    [
        ({"lora": {"r": 4, "use_dora": True}}, peft.LoraConfig(r=4, target_modules=["q", "wi"], use_dora=True)),
        ({"ia3": {"peft_compatible": True}}, peft.IA3Config()),
    ],
    ids=["dora", "ia3"],
)
def test_other_adapters_go_to_peft_and_back(root, tmp_path, techniques, config):
    folder = tiny.folder(root, "t5")
    config.task_type = "SEQ_2_SEQ_LM"
    other = peft.get_peft_model(tiny.reference("t5"), config).eval()
    model = chain.apply(burnish.load(folder), techniques)
    with torch.no_grad():
        for parameter in [*model.trainable().values(), *(p for p in other.parameters() if p.requires_grad)]:
            parameter += 0.2 * torch.randn(parameter.shape)
    saved = save(model, tmp_path / "adapter")
    assert_same(model, peft.PeftModel.from_pretrained(tiny.reference("t5"), saved).eval())
    other.peft_config["default"].base_model_name_or_path = str(folder)
    other.save_pretrained(tmp_path / "peft")
    assert_same(burnish.load(tmp_path / "peft"), other)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_adapters_are_the_formula_in_every_sub_block(root, tmp_path, placement):
    model = chain.apply(burnish.load(tiny.folder(root, "t5")), {"adapters": {"size": 5, "placement": placement}})
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.2 * torch.randn(parameter.shape)
    stored = load_file(save(model, tmp_path) / "burnish.safetensors")
    theirs, layout = tiny.reference("t5"), model.net.layout
    wrapped = {name.removesuffix(".down") for name in stored if name.endswith(".down")}
    ends = ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")[2 * (placement == "pfeiffer") :]
    assert {layout.modules[path] for path in wrapped} == {
        name for name, _ in theirs.named_modules() if name.endswith(ends)
    }
    for path in wrapped:
        down, down_bias, up, up_bias = (stored.pop(f"{path}.{leaf}") for leaf in ("down", "down_bias", "up", "up_bias"))

        def hook(module, inputs, y, parts=(down, down_bias, up, up_bias)):
            return y + F.gelu(y @ parts[0].T + parts[1]) @ parts[2].T + parts[3]

        theirs.get_submodule(layout.modules[path]).register_forward_hook(hook)
    assert bool(stored) == (placement == "houlsby")
    for name, tensor in stored.items():
        theirs.get_parameter(layout.tensors[name]).data.copy_(tensor)
    assert_same(model, theirs)


def test_the_encoder_alone_equals_transformers(root, tmp_path):
    folder = tiny.folder(root, "t5")
    encoder = transformers.T5EncoderModel.from_pretrained(folder).eval()
    model = burnish.load(folder, head="none")
    assert not any("decoder" in name for name, _ in model.net.named_parameters())
    batch = collated(model, examples(((7, 3), (4, 2))))
    real = batch["attention_mask"]
    with torch.no_grad():
        want = encoder(input_ids=batch["input_ids"], attention_mask=real.long()).last_hidden_state
        torch.testing.assert_close(forward(model, batch)[real], want[real], atol=1e-4, rtol=0)
        pooled = model.net.pool(want, real)
    torch.testing.assert_close(pooled[1], want[1, :6].mean(0))
    again, info = transformers.T5EncoderModel.from_pretrained(save(model, tmp_path), output_loading_info=True)
    assert not any(info.values()), info
    assert not any("decoder" in name for name, _ in burnish.load(tmp_path).net.named_parameters())


def test_a_new_head_on_the_encoder(root, tmp_path, monkeypatch):
    from burnish.store.tensors import Entry

    data, out, read = tmp_path / "rows.jsonl", str(tmp_path / "out"), set()
    table = [(f"{a} {b}", c) for a in ("the", "a", "big") for b, c in (("cat", "yes"), ("dog", "no"))]
    data.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in table))
    plain = Entry.read
    monkeypatch.setattr(Entry, "read", lambda self, scratch=None: read.add(self.start) or plain(self, scratch))
    options = ["--data", str(data), "--text-columns", "[text]", "--label-column", "label", "--output-dir", out]
    options += ["--max-steps", "60", "--per-device-train-batch-size", "6", "--learning-rate", "0.02"]
    assert main(["tune", str(tiny.folder(root, "t5")), "--techniques", "[lora]", *options]) == 0
    own = burnish.load(tiny.folder(root, "t5"), head="none")
    assert len(read) == len(list(own.net.named_parameters()))  # and nothing of the decoder
    task = {"name": "t", "data": str(data), "eval_data": str(data), "text_columns": ["text"], "label_column": "label"}
    model = burnish.load(out)
    assert measure(model, task) == 1.0
    assert not any("decoder" in name for name, _ in model.net.named_parameters())
    assert latency(model, LatencyConfig(8, 4, 0, 2))["tokens_per_second"] > 0
    encoder, info = transformers.T5EncoderModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and encoder is not None


def test_latency_and_plan(root):
    folder = tiny.folder(root, "t5")
    assert latency(burnish.load(folder), LatencyConfig(8, 4, 0, 2))["tokens_per_second"] > 0
    assert plan(folder, ["lora"]).cache > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["T5ForSequenceClassification"]}, "architecture 'T5ForSequenceClassification'"),
        ({"feed_forward_proj": "gated-mish"}, "activation 'mish' is not supported"),
        ({"is_decoder": True}, "is_decoder: true is not supported"),
        ({"d_kv": None}, "d_kv"),
        ({"relative_attention_max_distance": 4}, "relative_attention_num_buckets: 8 do not fit"),
        ({"decoder_start_token_id": 80}, "decoder_start_token_id: 80"),
        ({"decoder_start_token_id": None, "pad_token_id": None}, "decoder_start_token_id"),
    ],
)
def test_what_is_refused(root, tmp_path, changes, reason):
    tiny.write(tmp_path, tiny.reference("t5"))
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None or key != "d_kv"}))
    with pytest.raises(UserError, match=reason) as caught:
        burnish.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_an_encoder_decoder_does_not_do(root, tmp_path, capsys):
    folder, data, text = str(tiny.folder(root, "t5")), str(rows(tmp_path)), tmp_path / "text.txt"
    text.write_text("the cat sees the dog")
    tune = ["tune", folder, "--max-steps", "1", "--output-dir", str(tmp_path / "out"), "--data"]
    for arguments, reason in (
        ([*tune, data, "--packing", "true"], "rows are not packed"),
        ([*tune, data, "--train-on", "all"], "source is read"),
        ([*tune, str(text)], "learns from prompt and completion"),
        (["chat", folder], "no chat template"),
    ):
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
    model = chain.apply(burnish.load(folder), ["lora"])
    with pytest.raises(UserError, match="put transfer first"):
        chain.apply(model, ["transfer"])
    with pytest.raises(UserError, match="give every example a prompt"):
        loss_sum(model, collated(model, [Example([7, 8], [7, 8])]))


def test_data_preview_shows_source_and_target(root, tmp_path, capsys):
    assert main(["data", "preview", str(rows(tmp_path)), "--model", str(tiny.folder(root, "t5"))]) == 0
    assert "the cat ? <eos>[[ red blue <eos>]]" in capsys.readouterr().out
