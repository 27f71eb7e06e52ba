"""Encoder-decoders without a native family, against transformers and peft."""

from __future__ import annotations

import json

import peft
import pytest
import tiny_foreign
import torch

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
from burnish.model.example import IGNORE, Example
from burnish.model.fallback_pair import ForeignPair
from burnish.store.checkpoint import save

PROMPTS = ["the cat", "where is the big red dog ?", "who sees", "is rome big ?"]


@torch.no_grad()
def lively(family: str, **changes):
    """A reference whose texts depend on their source."""
    model = tiny_foreign.reference(family, **changes)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ("layers" in name or "shared" in name):
            parameter.mul_(4 if "layers" in name else 0.3)
    return model


@pytest.fixture(params=tiny_foreign.PAIRS)
def pair(request, tmp_path):
    """(transformers' model, burnish's)."""
    model = lively(request.param)
    model.save_pretrained(tmp_path / "base")
    tiny_foreign.tiny.tokenizer("seq2seq").save_pretrained(tmp_path / "base")
    loaded = burnish.load(tmp_path / "base")
    assert isinstance(loaded.net, ForeignPair)
    return model, loaded


def batch_of(model: Model) -> dict[str, torch.Tensor]:
    draw, rows = torch.Generator().manual_seed(0), []
    for source, target in ((20, 5), (9, 9), (4, 2)):
        ids = torch.randint(6, 50, (source + target,), generator=draw).tolist()
        rows.append(Example(ids, [IGNORE] * source + ids[source:]))
    return collated(model, rows)


@torch.no_grad()
def assert_same(model: Model, reference) -> None:
    batch = batch_of(model)
    real = batch["attention_mask"]
    want = reference(
        input_ids=batch["source_input_ids"],
        attention_mask=batch["source_attention_mask"].long(),
        decoder_input_ids=batch["input_ids"],
        decoder_attention_mask=real.long(),
    ).logits
    torch.testing.assert_close(model.net.logits(forward(model, batch))[real], want[real], atol=1e-4, rtol=0)


def test_logits_equal_transformers_before_and_after_saving(pair, tmp_path):
    reference, model = pair
    assert_same(model, reference)
    again, info = type(reference).from_pretrained(save(model, tmp_path / "saved"), output_loading_info=True)
    assert not any(info.values()), info
    assert_same(model, again.eval())
    assert_same(burnish.load(tmp_path / "saved"), reference)


def test_generation_equals_transformers(pair):
    reference, model = pair
    texts = generate(model, PROMPTS, GenerationConfig(max_new_tokens=8, min_new_tokens=8))
    for prompt, done in zip(PROMPTS, texts, strict=True):
        x = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        want = reference.generate(x, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1)
        assert done.ids == want[0, 1:].tolist()


def test_a_batch_gives_each_row_what_it_gets_alone(pair):
    model, settings = pair[1], GenerationConfig(max_new_tokens=9, do_sample=True, top_k=20)
    assert [generate(model, [prompt], settings)[0] for prompt in PROMPTS] == generate(model, PROMPTS, settings)
    assert latency(model, LatencyConfig(8, 4, 0, 2))["tokens_per_second"] > 0


def test_the_first_token_is_the_one_that_the_config_forces(tmp_path):
    reference = lively("bart")
    reference.generation_config.forced_bos_token_id = 9
    reference.save_pretrained(tmp_path)
    tiny_foreign.tiny.tokenizer("seq2seq").save_pretrained(tmp_path)
    done = generate(burnish.load(tmp_path), PROMPTS[:1], GenerationConfig(max_new_tokens=4, min_new_tokens=4))[0]
    x = torch.tensor([burnish.load(tmp_path).tokenizer(PROMPTS[0])["input_ids"]])
    want = reference.generate(x, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)[0, 1:].tolist()
    assert done.ids == want and want[0] == 9


def test_a_checkpoint_without_its_buffer_or_head(tmp_path):
    reference = lively("bart")
    reference.model.save_pretrained(tmp_path)  # BartModel, whose embedding is its head
    tiny_foreign.tiny.tokenizer("seq2seq").save_pretrained(tmp_path)
    assert_same(burnish.load(tmp_path), reference)


def test_lora_goes_to_peft_and_back(root, tmp_path):
    folder = tiny_foreign.folder(root, "bart")
    model = chain.apply(burnish.load(folder), [{"lora": {"r": 4}}])
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape)
    saved = save(model, tmp_path / "adapter")
    assert "model.decoder.layers.0.encoder_attn.q_proj" in model.chain[0].config.target_modules
    assert json.loads((saved / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert_same(model, peft.PeftModel.from_pretrained(tiny_foreign.reference("bart"), saved).eval())
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    other = peft.get_peft_model(tiny_foreign.reference("bart"), config).eval()
    other.peft_config["default"].base_model_name_or_path = str(folder)
    other.save_pretrained(tmp_path / "peft")
    assert_same(burnish.load(tmp_path / "peft"), other)


@pytest.mark.parametrize("family", tiny_foreign.PAIRS)
def test_checkpointing_and_mixed_precision_change_nothing_but_rounding(root, family):
    model = chain.apply(burnish.load(tiny_foreign.folder(root, family)), ["nf4", {"lora": {"r": 4}}])
    for part in model.net.hf.modules():
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.0
    batch = batch_of(model)

    def gradients(**settings) -> torch.Tensor:
        for name, value in settings.items():
            setattr(model.net, name, value)
        model.net.train().zero_grad()
        loss_sum(model, batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.trainable().values()])

    want = gradients()
    torch.testing.assert_close(gradients(gradient_checkpointing=True), want)
    rounded = gradients(gradient_checkpointing=False, compute_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32 and (rounded - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("techniques", ["[{lora: {target_modules: all-linear}}]", "[full]"])
def test_verbs_tune_merge_quantize_and_measure(root, tmp_path, techniques):
    table = [(f"{a} {b} ?", c) for a in ("the", "a", "big") for b, c in (("cat", "red blue"), ("dog", "yes"))]
    data, out = tmp_path / "rows.jsonl", str(tmp_path / "tuned")
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in table))
    options = ["--data", str(data), "--output-dir", out, "--techniques", techniques, "--learning-rate", "0.01"]
    options += ["--max-steps", "80", "--per-device-train-batch-size", "6"]
    assert main(["tune", str(tiny_foreign.folder(root, "bart")), *options]) == 0
    if "lora" in techniques:
        assert main(["merge", out, "--output-dir", str(tmp_path / "merged")]) == 0
        out = str(tmp_path / "merged")
        _, info = type(tiny_foreign.reference("bart")).from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
    task = {"name": "rows", "data": str(data), "eval_data": str(data)}
    assert measure(burnish.load(out), task) == 1.0
    assert generate(burnish.load(out), ["big dog ?"], GenerationConfig(max_new_tokens=6))[0].text == "yes"
    assert main(["quantize", out, "--method", "int8", "--output-dir", str(tmp_path / "small")]) == 0
    assert measure(burnish.load(tmp_path / "small"), task) >= 0.5


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("bart", {"architectures": ["BartForSequenceClassification"]}, "supported: BartForConditionalGeneration"),
        ("bart", {"tie_word_embeddings": False}, "several embeddings"),
        ("bart", {"decoder_start_token_id": None}, "decoder_start_token_id is missing"),
        ("pegasus", {"encoder_layers": 3}, "missing model.encoder.layers.2"),
    ],
)
def test_what_is_refused(tmp_path, family, changes, reason):
    tiny_foreign.reference(family).save_pretrained(tmp_path)
    tiny_foreign.tiny.tokenizer("seq2seq").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=reason) as caught:
        burnish.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_encoder_alone_gets_no_head(root):
    for techniques in ([], ["transfer"]):
        with pytest.raises(UserError, match="transformers has no classifier of this kind"):
            chain.apply(burnish.load(tiny_foreign.folder(root, "bart"), techniques=techniques), ["transfer"])
