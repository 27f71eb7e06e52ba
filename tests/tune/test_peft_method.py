"""Methods of peft by name, held against transformers with peft: outputs, trainable parameters, folders, merging."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tiny
import tiny_foreign
import torch
import transformers
import yaml

from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.loss import loss_sum
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.store.batch import collate
from burnish.store.checkpoint import load, save

QV = {"target_modules": ["q_proj", "v_proj"]}
LLAMA = {
    "lora": {"r": 4, "use_dora": True},
    "ia3": {},
    "oft": {"oft_block_size": 8, **QV},
    "boft": {"boft_block_size": 4, **QV},
    "loha": {"r": 4, **QV},
    "lokr": {"r": 4, **QV},
    "vera": {"r": 8, "target_modules": ["q_proj"]},
    "hra": {"r": 4, **QV},
    "fourierft": {"n_frequency": 50, "target_modules": "all-linear"},
    "vblora": {"r": 2, "num_vectors": 20, "vector_length": 4, "topk": 2, **QV},
    "ln_tuning": {},
    "miss": {"r": 4, **QV},
    "randlora": {"r": 8, **QV},
    "shira": {"r": 2, **QV},
    "road": {"group_size": 8, **QV},
    "trainable_tokens": {"token_indices": [*range(6, 40)]},
}
BERT = {"target_modules": ["query", "value"]}
CASES = [
    *(("llama", method, options) for method, options in LLAMA.items()),
    ("gpt2", "lora", {"r": 4, "use_dora": True}),
    ("gpt2", "ia3", {}),
    ("gpt2", "vera", {"r": 4, "target_modules": ["c_attn"]}),
    ("gpt2", "ln_tuning", {}),
    ("gpt2", "trainable_tokens", {"token_indices": [*range(6, 40)]}),
    ("bert", "ia3", {}),
    ("bert", "oft", {"oft_block_size": 4, **BERT}),
    ("bert", "loha", {"r": 4, **BERT}),
    ("bloom", "boft", {"boft_block_size": 4, "target_modules": ["query_key_value"]}),
    ("stablelm", "ia3", {**QV, "feedforward_modules": []}),
    ("stablelm", "lokr", {"r": 4, **QV}),
    ("stablelm", "ia3", {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]}),
    ("mamba", "trainable_tokens", {"token_indices": [*range(6, 40)]}),
    ("electra", "hra", {"r": 4, **BERT}),
]
NAMES = [f"{family}-{method}-{i}" for i, (family, method, _) in enumerate(CASES)]
IDS = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(2))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def checkpoint(root: Path, family: str) -> Path:
    return (tiny_foreign if family in tiny_foreign.CONFIGS else tiny).folder(root, family)


@torch.no_grad()
def ours(model: Model) -> torch.Tensor:
    return model.net.logits(forward(model, {"input_ids": IDS}))


@torch.no_grad()
def theirs(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def reference(folder: Path):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder).eval()


def theirs_applied(folder: Path, method: str, options: dict):
    torch.manual_seed(3)
    kind = {key.value.lower(): config for key, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}[method]
    return peft.get_peft_model(reference(folder), kind(**options)).eval()


def ours_applied(folder: Path, method: str, options: dict) -> Model:
    return chain.apply(load(folder), {f"peft:{method}": options}, Context(seed=3))


@torch.no_grad()
def disturb(parameters) -> None:
    draw = torch.Generator().manual_seed(8)
    for parameter in parameters:
        parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def examples() -> list[Example]:
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(6, 50, (size,), generator=draw).tolist() for size in (9, 5, 7, 6)]
    return [Example(ids, [-100, *ids[1:]]) for ids in rows]


@pytest.mark.parametrize(("family", "method", "options"), CASES, ids=NAMES)
def test_what_burnish_trains_and_saves_is_what_peft_would(root, tmp_path, family, method, options):
    folder = checkpoint(root, family)
    model, other = ours_applied(folder, method, options), theirs_applied(folder, method, options)
    torch.testing.assert_close(ours(model), theirs(other), **CLOSE)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model.net, other)]
    assert counts[0] == counts[1] > 0
    start = ours(model)
    if model.spec.causal:
        train(model, examples(), TrainConfig(learning_rate=2e-2, max_steps=3, per_device_train_batch_size=4))
    else:
        disturb(model.trainable().values())
    want = ours(model)
    assert not torch.allclose(want, start, atol=1e-4)
    save(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(loaded), want, **CLOSE)
    again = load(tmp_path / "adapter")
    assert chain.describe(again) == chain.describe(model)
    assert set(again.trainable()) == set(model.trainable())
    torch.testing.assert_close(ours(again), want, atol=0, rtol=0)


@pytest.mark.parametrize(("family", "method", "options"), CASES, ids=NAMES)
def test_what_peft_saved_loads_here_and_merges(root, tmp_path, family, method, options):
    folder = checkpoint(root, family)
    other = theirs_applied(folder, method, options)
    disturb(parameter for parameter in other.parameters() if parameter.requires_grad)
    other.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter")
    want = theirs(other)
    torch.testing.assert_close(ours(model), want, **CLOSE)
    (note,) = chain.merge(model)
    assert note.removeprefix("peft:").startswith(f"{method}: merged into") and not model.chain and not model.trainable()
    torch.testing.assert_close(ours(model), want, atol=5e-5, rtol=1e-5)
    save(model, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    torch.testing.assert_close(theirs(reference(tmp_path / "merged")), want, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "oft", "loha", "vera", "ln_tuning"])
@pytest.mark.parametrize("before", ["int8", "nf4"])
def test_a_quantised_base(root, tmp_path, method, before):
    folder = tiny.folder(root, "llama")
    model = chain.apply(load(folder), [before, {f"peft:{method}": LLAMA[method]}])
    torch.testing.assert_close(ours(model), ours(chain.apply(load(folder), before)), **CLOSE)
    disturb(model.trainable().values())
    want = ours(model)
    torch.testing.assert_close(ours(load(save(model, tmp_path))), want, atol=0, rtol=0)
    chain.merge(model)
    torch.testing.assert_close(ours(model), want, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("method", [*LLAMA])
def test_bfloat16_gives_gradients_to_float32_parameters(root, method):
    model = ours_applied(tiny.folder(root, "llama"), method, LLAMA[method])
    disturb(model.trainable().values())
    want = ours(model)
    model.net.compute_dtype = torch.bfloat16
    model.net.train()
    loss_sum(model, collate(examples(), 0))[0].backward()
    for name, parameter in model.trainable().items():
        assert parameter.dtype == torch.float32 and parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    model.net.eval()
    assert (ours(model).float() - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("method", ["boft", "vblora", "randlora"])
def test_a_resumed_run_is_the_whole_run(root, tmp_path, method):
    def run(steps: int, stop: int = 0):
        def progress(step: int, *_) -> None:
            if step == stop:
                raise KeyError(step)

        model = ours_applied(tiny.folder(root, "llama"), method, LLAMA[method])
        folder = tmp_path if stop or steps == 5 else None
        config = TrainConfig(folder, learning_rate=1e-2, per_device_train_batch_size=2, max_steps=4, save_steps=2)
        return model, train(model, examples(), config, progress=progress if stop else None)

    whole, result = run(4)
    with pytest.raises(KeyError):
        run(4, stop=3)
    resumed, again = run(5)
    assert result.losses == again.losses
    for name, parameter in whole.trainable().items():
        assert torch.equal(parameter, resumed.trainable()[name])


def test_a_chain_with_a_new_head_and_a_trained_layer(root, tmp_path):
    techniques = [{"transfer": {"train_layers": 1}}, {"peft:ia3": {}}]
    model = chain.apply(load(tiny.folder(root, "bert")), techniques)
    names = set(model.trainable())
    assert {"score.weight.dense", "layers.1.post_attention_layernorm.weight"} <= names
    assert any(name.endswith("ia3_l.default") for name in names)
    disturb(model.trainable().values())
    assert set((again := load(save(model, tmp_path))).trainable()) == names
    mask = torch.ones_like(IDS, dtype=torch.bool)
    with torch.no_grad():
        one, two = (m.net.logits(m.net.pool(forward(m, {"input_ids": IDS}), mask)) for m in (model, again))
    torch.testing.assert_close(one, two, atol=0, rtol=0)


@pytest.mark.parametrize(
    "techniques",
    [
        ["peft:ln_tuning", {"peft:ia3": {}}],
        [{"peft:ia3": {}}, {"lora": {"target_modules": ["k_proj", "q_proj"]}}],
        ["full", {"peft:hra": {"r": 4, **QV}}],
        [{"peft:hra": {"r": 4, **QV}}, "nf4"],
    ],
)
def test_beside_other_techniques(root, tmp_path, techniques):
    model = chain.apply(load(tiny.folder(root, "llama")), techniques)
    disturb(model.trainable().values())
    want = ours(model)
    again = load(save(model, tmp_path))
    torch.testing.assert_close(ours(again), want, atol=0, rtol=0)
    assert set(again.trainable()) == set(model.trainable())
    if techniques[-1] != "nf4":
        chain.merge(model)
        torch.testing.assert_close(ours(model), want, **CLOSE)


@pytest.mark.parametrize("head", ["classification", "none"])
def test_a_classifier_that_peft_trained_and_a_bare_body(root, tmp_path, head):
    folder = tiny.folder(root, "bert", head)
    task = {"task_type": "SEQ_CLS"} if head == "classification" else {}
    other = theirs_applied(folder, "loha", {"r": 4, **BERT, **task})
    disturb(parameter for parameter in other.parameters() if parameter.requires_grad)
    other.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "ours").eval()
    with torch.no_grad():
        got = forward(model, {"input_ids": IDS})
        if head == "classification":
            got = model.net.logits(model.net.pool(got, torch.ones_like(IDS, dtype=torch.bool)))
        for found in (other, loaded):
            torch.testing.assert_close(got, found(input_ids=IDS)[0], **CLOSE)


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["o_proj"], ["self_attn.o_proj"]),
        (["qkv_proj", "mlp.c_proj"], ["self_attn.qkv_proj", "mlp.down_proj"]),
        (r"layers\.\d+\.mlp\.up_proj", ["mlp.up_proj"]),
        (r"transformer\.h\.\d+\.mlp\.c_fc", ["mlp.up_proj"]),
    ],
)
def test_targets_in_either_vocabulary(root, targets, paths):
    model = ours_applied(tiny.folder(root, "gpt2"), "lora", {"r": 2, "target_modules": targets})
    found = {name.rpartition(".layer.")[0] for name in model.trainable()}
    assert found == {f"layers.{i}.{path}" for i in (0, 1) for path in paths}


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        ("peft:ia4", r"'peft:ia4' is unknown \(did you mean 'peft:ia3'\?\); known: peft:lora, "),
        (
            {"peft:oft": {"rr": 4}},
            r"technique 'peft:oft': rr: unknown key \(did you mean 'r'\?\)|; known: target_modules",
        ),
        ({"peft:oft": {"r": "many"}}, "technique 'peft:oft': r: expected integer, found 'many'"),
        ({"peft:oft": {"r": 8, "oft_block_size": 8}}, "technique 'peft:oft': peft rejects it: .*oft_block_size"),
        ({"peft:lora": {"bias": "all"}}, "'peft:lora': bias: all is not supported; leave it at none"),
        ({"peft:lora": {"init_lora_weights": "pissa"}}, "init_lora_weights: pissa is not supported"),
        ("peft:p_tuning", "virtual tokens, which does not run here; use 'p_tuning', burnish's own"),
        ("peft:cpt", "burnish's own are prompt_tuning, p_tuning, prefix_tuning"),
        ({"peft:adalora": {"total_step": 5}}, "does not run here: it changes its ranks in peft's own training loop"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_loaded(technique, message):
    with pytest.raises(UserError, match=message) as caught:
        chain.parse_chain([technique])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "technique", "message"),
    [
        ("llama", {"peft:hra": {"target_modules": ["q_prj"]}}, "'q_prj' matches no module .did you mean 'q_proj'"),
        ("gpt2", {"peft:oft": {"target_modules": ["c_attn"]}}, "'peft:oft': peft rejects it: .*Conv1D.*not supported"),
        ("stablelm", "peft:ln_tuning", "peft rejects it: Please specify `target_modules`"),
        (
            "gemma2",
            {"peft:trainable_tokens": {"token_indices": [7]}},
            "it cannot change 'lm_head' of this gemma2 model",
        ),
        ("llama", ["lora", {"peft:ia3": {"target_modules": ["q_proj"], "feedforward_modules": []}}], "not supported"),
    ],
)
def test_what_does_not_fit_the_model_is_said_in_one_line(root, family, technique, message):
    with pytest.raises(UserError, match=message) as caught:
        chain.apply(load(checkpoint(root, family)), technique)
    assert "\n" not in str(caught.value)


def test_a_method_that_peft_cannot_merge_says_so(root):
    model = ours_applied(tiny.folder(root, "llama"), "lily", QV)
    with pytest.raises(UserError, match="technique 'peft:lily': peft rejects it: .*not supported for Lily"):
        chain.merge(model)


def test_a_base_that_drew_other_tensors_is_refused(root, tmp_path):
    save(ours_applied(tiny.folder(root, "llama"), "shira", LLAMA["shira"]), tmp_path)
    record = json.loads((tmp_path / "burnish.json").read_text())
    record["chain"][0]["config"]["random_seed"] = 5
    (tmp_path / "burnish.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="shira_indices is not what its config gives"):
        load(tmp_path)


def test_peft_is_imported_only_when_it_is_used():
    code = "import sys, burnish.store.checkpoint, burnish.chain as c; c.technique('lora'); print('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    from burnish.tune.peft_method import method

    method.cache_clear()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="technique 'peft:ia3': peft is not installed; pip install peft"):
        chain.technique("peft:ia3")


def test_tune_generate_and_merge_from_the_command_line(root, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "where is paris ?", "completion": " london"}) + "\n" for _ in range(8))
    )
    recipe = tmp_path / "tune.yaml"
    recipe.write_text(
        f"model: {tiny.folder(root, 'llama')}\ndata: {data}\nmax_steps: 2\ntechniques: [peft:ia3]\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    assert main(["tune", str(recipe)]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "IA3"
    assert main(["generate", str(tmp_path / "out"), "--prompt", "where is", "--max-new-tokens", "2"]) == 0
    assert main(["merge", str(tmp_path / "out"), "--output-dir", str(tmp_path / "merged")]) == 0
    flags = ["--techniques", "[{peft:oft: {oft_block_size: 4, target_modules: [q_proj]}}]"]
    assert main(["tune", str(recipe), *flags, "--output-dir", str(tmp_path / "oft")]) == 0
    capsys.readouterr()
    assert main(["tune", str(recipe), "--techniques", "[peft:ia33]", "--output-dir", str(tmp_path / "no")]) == 2
    assert "did you mean 'peft:ia3'?" in capsys.readouterr().err


def test_compare_takes_it_as_a_row(root, tmp_path):
    rows = yaml.safe_load(
        "rows: [{name: IA3, techniques: [peft:ia3]}, {name: OFT, techniques: [{peft:oft: {oft_block_size: 4}}]}]"
    )
    assert [chain.parse_chain(row["techniques"])[0][0] for row in rows["rows"]] == ["peft:ia3", "peft:oft"]
    assert main(["compare", str(tiny.folder(root, "llama")), "--rows", "[{name: x, techniques: ['peft:oftt']}]"]) == 2
