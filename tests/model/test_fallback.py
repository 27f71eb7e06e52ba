"""Models without a native family, against transformers and peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tiny_foreign
import torch
import transformers
from tiny_foreign import CONFIGS, DECODERS, ENCODERS

import burnish
from burnish import chain
from burnish.bench.measure import measure
from burnish.chain import Context, Model, forward
from burnish.config import UserError, read_config
from burnish.engine.generate import GenerationConfig, generate
from burnish.engine.loss import loss_sum
from burnish.engine.procedures import compress, merge, tune
from burnish.model.fallback import Foreign
from burnish.store.batch import collate
from burnish.store.checkpoint import save
from burnish.store.data import encode_prompt

NO_CLASSIFIER = ("cohere", "mamba")
CASES = [(family, head) for family in (*DECODERS, *ENCODERS) for head in ("", "classification", "none")]
CASES = [(family, head) for family, head in CASES if head != "classification" or family not in NO_CLASSIFIER]
PROMPTS = ["the cat", "where is the big red dog ?", "who sees"]


def ids(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(6, 50, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(reference, x: torch.Tensor) -> torch.Tensor:
    out = reference(input_ids=x)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@torch.no_grad()
def ours(model: Model, x: torch.Tensor) -> torch.Tensor:
    hidden = forward(model, {"input_ids": x})
    if model.spec.head == "none":
        return hidden
    if model.spec.head == "classification":
        hidden = model.net.pool(hidden, torch.ones(x.shape, dtype=torch.bool))
    return model.net.logits(hidden)


def reloaded(folder: Path, family: str, head: str):
    """The folder's model by transformers, which must find nothing missing and nothing to spare."""
    kind = type(tiny_foreign.reference(family, head))
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def disturb(model: Model) -> Model:
    draw = torch.Generator().manual_seed(11)
    for parameter in model.trainable().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize(("family", "head"), CASES)
def test_logits_equal_transformers_before_and_after_saving(root, tmp_path, family, head):
    model = burnish.load(tiny_foreign.folder(root, family, head))
    assert isinstance(model.net, Foreign)
    want = theirs(tiny_foreign.reference(family, head), ids())
    torch.testing.assert_close(ours(model, ids()), want, atol=1e-4, rtol=0)
    again = reloaded(save(model, tmp_path / "saved"), family, head)
    torch.testing.assert_close(theirs(again, ids()), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "openai-gpt"])
def test_generation_equals_transformers(root, family):
    model, reference = burnish.load(tiny_foreign.folder(root, family)), tiny_foreign.reference(family)
    texts = generate(model, PROMPTS, GenerationConfig(max_new_tokens=8, min_new_tokens=8))
    for prompt, done in zip(PROMPTS, texts, strict=True):
        x = torch.tensor([encode_prompt(model.tokenizer, prompt).ids])
        want = reference.generate(x, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=1)
        assert done.ids == want[0, x.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["phi", "gpt_bigcode", "openai-gpt", "roberta"])
def test_lora_goes_to_peft_and_back(root, tmp_path, family):
    folder = tiny_foreign.folder(root, family)
    model = disturb(chain.apply(burnish.load(folder), [{"lora": {"r": 4, "target_modules": "all-linear"}}]))
    want = ours(model, ids())
    adapted = peft.PeftModel.from_pretrained(tiny_foreign.reference(family), save(model, tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(adapted, ids()), want, atol=1e-4, rtol=0)
    targets = list(model.net.layout.lora_targets)
    theirs_too = peft.get_peft_model(
        tiny_foreign.reference(family), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    ).eval()
    theirs_too.peft_config["default"].base_model_name_or_path = str(folder)
    theirs_too.save_pretrained(tmp_path / "peft")
    torch.testing.assert_close(
        ours(burnish.load(tmp_path / "peft"), ids()), theirs(theirs_too, ids()), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("family", ["stablelm", "electra"])
def test_a_shared_embedding_stays_shared(tmp_path, family):
    changes = {"tie_word_embeddings": True}
    tiny_foreign.reference(family, **changes).save_pretrained(tmp_path / "base")
    tiny_foreign.tiny.tokenizer("decoder").save_pretrained(tmp_path / "base")
    model = chain.apply(burnish.load(tmp_path / "base"), ["full"])
    assert model.net.hf.get_output_embeddings().weight is model.net.embed_tokens.weight
    model.chain.clear()
    saved = save(disturb(model), tmp_path / "saved")
    again = reloaded(saved, family, "")
    torch.testing.assert_close(theirs(again, ids()), ours(model, ids()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["cohere", "gptj", "roberta"])
def test_checkpointing_and_mixed_precision_change_nothing_but_rounding(root, family):
    model = burnish.load(tiny_foreign.folder(root, family))
    chain.apply(model, ["nf4", {"lora": {"r": 4, "target_modules": "all-linear"}}])
    disturb(model)
    examples = [encode_prompt(model.tokenizer, prompt) for prompt in PROMPTS]
    batch = collate(examples, 0)
    batch["labels"] = batch["input_ids"]

    def gradients(**settings) -> torch.Tensor:
        for name, value in settings.items():
            setattr(model.net, name, value)
        torch.manual_seed(0)
        model.net.train().zero_grad()
        loss_sum(model, batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.trainable().values()])

    want = gradients()
    torch.testing.assert_close(gradients(gradient_checkpointing=True), want)
    rounded = gradients(gradient_checkpointing=False, compute_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32 and (rounded - want).norm() < 0.1 * want.norm()


def test_a_checkpoint_in_bfloat16(root):
    model = burnish.load(tiny_foreign.folder(root, "phi"), torch.bfloat16)
    reference = tiny_foreign.reference("phi").to(torch.bfloat16)
    assert model.net.dtype == torch.bfloat16
    torch.testing.assert_close(ours(model, ids()), theirs(reference, ids()), atol=0.02, rtol=0.02)
    chain.apply(model, [{"transfer": {"train_layers": 1}}, "lora"])
    assert torch.isfinite(ours(model, ids())).all()


def test_verbs_tune_merge_quantize_and_measure(root, tmp_path):
    rows = [{"prompt": f"{a} {b}", "completion": c} for a in ("the", "a") for b, c in (("cat", "red"), ("dog", "blue"))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": str(tiny_foreign.folder(root, "stablelm")), "data": str(data), "learning_rate": 0.02}
    options |= {"max_steps": 30, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "tuned")}
    options |= {"techniques": [{"lora": {"target_modules": "all-linear"}}]}
    assert tune.run(read_config(tune.TuneConfig, None, options)) == 0
    merged = {"model": str(tmp_path / "tuned"), "output_dir": str(tmp_path / "merged")}
    assert merge.run(read_config(merge.MergeConfig, None, merged)) == 0
    small = {"model": str(tmp_path / "merged"), "output_dir": str(tmp_path / "small"), "method": "nf4"}
    assert compress.run(read_config(compress.QuantizeConfig, None, small)) == 0
    reloaded(tmp_path / "merged", "stablelm", "")
    task = {"name": "rows", "data": str(data), "eval_data": str(data)}
    scores = {name: measure(burnish.load(tmp_path / name), task) for name in ("tuned", "merged", "small")}
    assert scores["tuned"] == scores["merged"] == 1.0 and scores["small"] >= 0.5, scores


def test_an_encoder_learns_to_classify(root, tmp_path):
    rows = [{"text": f"{a} {b}", "label": c} for a in ("the", "a") for b, c in (("cat", "yes"), ("dog", "no"))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": str(tiny_foreign.folder(root, "roberta")), "data": str(data), "learning_rate": 0.02}
    options |= {"max_steps": 30, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "tuned")}
    options |= {"techniques": ["lora"], "text_columns": ["text"], "label_column": "label"}
    assert tune.run(read_config(tune.TuneConfig, None, options)) == 0
    task = {
        "name": "rows",
        "data": str(data),
        "eval_data": str(data),
        "text_columns": ["text"],
        "label_column": "label",
    }
    assert measure(burnish.load(tmp_path / "tuned"), task) == 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "stablellm"}, r"known neither to burnish nor to transformers \(did you mean 'stablelm'\?\)"),
        ({"model_type": "x-own", "auto_map": {}}, "the code that a checkpoint brings is never run"),
        ({"model_type": "bart"}, "architecture 'StableLmForCausalLM' is not supported; supported: BartForCond"),
        ({"architectures": ["StableLmForTokenClassification"]}, "architecture 'StableLmForTokenClassification'"),
        ({"hidden_size": 30}, "transformers rejects it"),
        ({"intermediate_size": 40, "num_hidden_layers": 3}, "missing .*unexpected|shape .* missing"),
    ],
)
def test_what_is_refused(root, tmp_path, changes, reason):
    tiny_foreign.reference("stablelm").save_pretrained(tmp_path)
    tiny_foreign.tiny.tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=reason) as caught:
        burnish.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_cache_there_is_no_generation(root):
    model = burnish.load(tiny_foreign.folder(root, "openai-gpt"))
    with pytest.raises(UserError, match="transformers keeps no cache for openai-gpt models"):
        generate(model, PROMPTS, GenerationConfig(max_new_tokens=4))


def test_a_prefix_does_not_train_under_checkpointing(root):
    model = chain.apply(burnish.load(tiny_foreign.folder(root, "phi")), ["prefix_tuning"], Context())
    model.net.train().gradient_checkpointing = True
    with pytest.raises(UserError, match="gradient_checkpointing"):
        forward(model, {"input_ids": ids()})


def test_a_native_model_imports_no_modelling_code():
    code = "import sys, burnish; burnish.load('pebble'); print('transformers.modeling_utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_the_tested_models_are_not_native():
    from burnish.model.families import FAMILIES

    assert not set(FAMILIES) & set(CONFIGS) and set(ENCODERS) < set(CONFIGS)
    assert transformers.__version__ >= "5"


def test_an_encoder_as_a_language_model_must_be_a_decoder(tmp_path):
    reference = tiny_foreign.reference("roberta")
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["RobertaForCausalLM"]}))
    with pytest.raises(UserError, match="is_decoder is false"):
        burnish.load(tmp_path)
