"""GGUF files, both ways: the families, tokenizers, techniques on them, and llama.cpp as the oracle."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest
import torch
from gguf_models import CASES, TEXT, TEXTS, checkpoint, logits, tokenizer

import burnish
from burnish import chain, cli
from burnish.compress import gguf as blocks
from burnish.compress.gguf import FORMATS, GGUF
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.model.linear import Dense, Weight
from burnish.native import products
from burnish.place import offload
from burnish.store.checkpoint import load, save
from burnish.store.gguf import read_gguf
from burnish.store.gguf_model import CODES, TYPES, write

PROMPT = "Question: What does Odile Kinlow like to eat? Answer:"
WIDE = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": True}
# Of the logits' spread: nearer to each other, rounding decides. llama.cpp rounds what meets a bfloat16 matrix to
# bfloat16, and what meets a quantised one to 8 bits (0.3); its cache is float16.
CLOSE = {"f32": 0.01, "f16": 0.01, "bf16": 0.06}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose rows are whole blocks of every type, tied, as a folder."""
    return checkpoint(tmp_path_factory.mktemp("wide"), "llama", **WIDE)


def exported(folder, path, kind: str, dtype=None):
    model = load(folder, dtype)
    write(model, path, kind)
    return model, load(path)


def greedy(model, prompts=(TEXT,), tokens: int = 12):
    return [reply.text for reply in burnish.generate(model, list(prompts), GenerationConfig(max_new_tokens=tokens))]


@pytest.mark.parametrize("case", CASES)
def test_families_come_back(tmp_path, case):
    family, changes = CASES[case]
    folder = checkpoint(tmp_path / "folder", family, **changes)
    model, again = exported(folder, tmp_path / "m.gguf", "f32")
    assert torch.equal(logits(again), logits(model))
    fields = {
        name for name in model.spec.__dataclass_fields__ if getattr(model.spec, name) != getattr(again.spec, name)
    }
    assert fields <= {"family", "rope_scaling"} and (family == "mistral") == ("family" in fields)
    assert greedy(again) == greedy(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gpt_neox"])
def test_quantised_files_compute_as_their_expanded_weights(tmp_path, family):
    width = {"gpt2": {"n_embd": 64}}.get(family, {"hidden_size": 64, "intermediate_size": 96})
    width |= {"bias": False} if family == "falcon" else {}
    _, model = exported(checkpoint(tmp_path / "folder", family, **width), tmp_path / "m.gguf", "q8_0")
    got, fused = logits(model), greedy(model)
    for module in model.net.modules():
        if isinstance(getattr(module, "weight", None), GGUF):
            module.weight = Dense(module.weight.dequantize())
    assert (got - logits(model)).norm() < 2e-4 * got.norm()
    assert fused == greedy(model)


@pytest.mark.parametrize("kind", [name for name in TYPES if name in FORMATS])
def test_matrices_stay_blocks(wide, tmp_path, kind, monkeypatch):
    _, model = exported(wide, tmp_path / "m.gguf", kind)
    weights = [module for module in model.net.modules() if isinstance(module, Weight)]
    assert {type(weight) for weight in weights} == {GGUF} and model.net.lm_head.weight is model.net.embed_tokens.storage
    assert {weight.format.name for weight in weights} == {kind}
    expanded = []
    monkeypatch.setattr(GGUF, "dequantize_to", lambda *_: pytest.fail("a matrix was expanded whole"))
    old = GGUF.expand
    monkeypatch.setattr(GGUF, "expand", lambda self, first, out: expanded.append(len(out)) or old(self, first, out))
    monkeypatch.setattr(blocks, "PIECE", 1)
    assert greedy(model, [TEXT * 3])  # a prompt of more tokens than the kernels take
    if products.usable(torch.device("cpu"), torch.float32):
        assert max(expanded, default=0) <= 512


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_have_the_gguf_packages_bytes(tmp_path, kind, dtype):
    """Ties between two numbers, subnormal and large ones among them."""
    package, reader = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf").GGUFReader
    draw, kept = torch.Generator().manual_seed(0), {}
    model = load(checkpoint(tmp_path / "folder", "qwen3"), dtype)
    for layer, part in enumerate(model.net.layers):
        dense = part.mlp.down_proj.weight.dense
        with torch.no_grad():
            dense.copy_(
                torch.randn(dense.shape, generator=draw) * 10.0 ** torch.randint(-9, 4, dense.shape, generator=draw)
            )
            dense[0, :8] = torch.tensor(
                [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 3 * 2**-25, -0.0, 65280.0]
            )
        kept[f"blk.{layer}.ffn_down.weight"] = dense.detach().float()
    write(model, tmp_path / "m.gguf", kind)
    found = {tensor.name: tensor for tensor in reader(tmp_path / "m.gguf").tensors}
    for name, dense in kept.items():
        want = package.quantize(dense.numpy(), found[name].tensor_type)
        assert found[name].tensor_type.name.lower() == kind
        assert bytes(found[name].data) == want.tobytes(), name


def test_written_again_nothing_changes(wide, tmp_path):
    _, model = exported(wide, tmp_path / "one.gguf", "q4_k")
    write(model, tmp_path / "two.gguf", "q4_k")
    first, second = (read_gguf(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    assert first.tensors.keys() == second.tensors.keys()
    for name, stored in first.tensors.items():
        assert torch.equal(stored.entry.read(), second.tensors[name].entry.read())


def test_rows_that_are_no_whole_blocks_take_another_type(tmp_path):
    folder = checkpoint(tmp_path / "folder", "llama", hidden_size=256, intermediate_size=96)
    notes = write(load(folder), tmp_path / "m.gguf", "q4_k")
    assert notes == ["2 matrices are q8_0: their rows are no whole blocks of q4_k"]
    found = read_gguf(tmp_path / "m.gguf").tensors
    assert found["blk.0.ffn_down.weight"].code == FORMATS["q8_0"].code
    assert found["blk.0.attn_q.weight"].code == FORMATS["q4_k"].code and found["blk.0.attn_norm.weight"].code == 0


def test_a_sliding_window_bounds_the_context(tmp_path):
    folder = checkpoint(tmp_path / "folder", "mistral")
    assert "its context is 4 tokens" in write(load(folder), tmp_path / "m.gguf", "f16")[0]
    assert load(tmp_path / "m.gguf").spec.max_positions == 4


@pytest.mark.parametrize("kind", TYPES)
def test_pebble_goes_out_and_comes_back(tmp_path, kind):
    model, again = exported("pebble", tmp_path / "pebble.gguf", kind)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    for text in (PROMPT, "Hello, wörld!  12 34\n\n<|user|>x", "日本 don't"):
        ids = model.tokenizer(text)["input_ids"]
        assert again.tokenizer(text)["input_ids"] == ids
        assert again.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert again.tokenizer.eos_token_id == 1 and again.generation_config == {"eos_token_id": [1]}
    assert greedy(again, [PROMPT], 2) == [" lentils."]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rendered = [x.tokenizer.apply_chat_template(turns, tokenize=False) for x in (model, again)]
    assert rendered[0] == rendered[1]


def test_lora_on_a_gguf_base(wide, tmp_path):
    _, model = exported(wide, tmp_path / "m.gguf", "q8_0")
    chain.apply(model, [{"lora": {"r": 2}}])
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    want = logits(model)
    save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load(tmp_path / "adapter")
    assert torch.equal(logits(again), want) and again.identity == load(tmp_path / "m.gguf").identity != ""
    with pytest.raises(UserError, match="lora is not in the weights"):
        write(again, tmp_path / "no.gguf", "q8_0")
    assert not list(tmp_path.glob("*no.gguf*"))
    chain.merge(again)
    save(again, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert all(isinstance(part, Dense) for part in merged.net.modules() if isinstance(part, Weight))
    assert (logits(merged) - want).norm() < 0.05 * want.norm()


def test_quantised_anew(wide, tmp_path):
    _, model = exported(wide, tmp_path / "m.gguf", "q8_0")
    want = logits(model)
    chain.apply(model, ["int8"])
    save(model, tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert (logits(again) - want).norm() < 0.06 * want.norm()
    notes = write(again, tmp_path / "again.gguf", "q4_0")
    assert notes == ["14 matrices were quantised otherwise, and are expanded first"]
    assert load(tmp_path / "again.gguf").net.layers[0].mlp.up_proj.weight.format.name == "q4_0"


def test_the_verbs_take_a_file(wide, tmp_path, capsys):
    path = tmp_path / "runs" / "wide.gguf"
    assert cli.main(["export", str(wide), "--type", "q8_0", "--output", str(path)]) == 0
    assert "saved to" in capsys.readouterr().out
    assert cli.main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    model = load(path)
    assert planned["weights"] == sum(p.nbytes for p in model.net.parameters())
    assert planned["parameters"] == model.parameter_count() == load(wide).parameter_count()
    assert cli.main(["generate", str(path), "--prompt", TEXT, "--max-new-tokens", "4"]) == 0
    assert cli.main(["export", str(wide), "--output", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_proof_of_an_export(wide, tmp_path, capsys):
    """It is shown, warns beyond its threshold, and with --strict refuses."""
    words = ["export", str(wide), "--type", "q4_0", "--output"]
    assert cli.main([*words, str(tmp_path / "plain.gguf"), "--max-kl", "10", "--strict", "true"]) == 0
    size, proof, note, saved = capsys.readouterr().out.splitlines()
    assert re.match(r"proof: KL [\d.e-]+ nats a token .*, same likeliest token [\d.]+%, perplexity [\d.]+ -> ", proof)
    assert saved == f"saved to {tmp_path / 'plain.gguf'}" and size.endswith(" MiB")
    assert note.startswith("note: a perplexity above the vocabulary's ")  # as random weights have
    warning = "warning: KL is beyond 1e-09: the result differs from the model; worst parts: "
    assert cli.main([*words, str(tmp_path / "warned.gguf"), "--max-kl", "1e-9"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1] == proof and shown.err.startswith(warning)
    assert "layers.0 (+" in shown.err and "embeddings (+" in shown.err
    assert cli.main([*words, str(tmp_path / "refused.gguf"), "--max-kl", "1e-9", "--strict", "true"]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err == f"burnish export: strict: nothing is written; {shown.err}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.gguf", "warned.gguf"]
    assert cli.main([*words, str(tmp_path / "told.gguf"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["proof"]["kl"] < 10 and told["proof"]["head"] > 0 and told["output"] == str(tmp_path / "told.gguf")


@pytest.mark.parametrize("kind", TYPES)
def test_only_plain_floats_are_quantised_from_the_terminal(wide, tmp_path, capsys, kind):
    write(load(wide), tmp_path / "m.gguf", kind)
    words = ["quantize", str(tmp_path / "m.gguf"), "--method", "nf4", "--output-dir", str(tmp_path / "out")]
    if kind in ("f32", "f16", "bf16"):
        assert cli.main(words) == 0 and load(tmp_path / "out").chain[0].name == "nf4"
        return
    assert cli.main(words) == 2 and not (tmp_path / "out").exists()
    found = f"m.gguf: embed_tokens is quantised already ({kind}); start from the 16-bit model\n"
    assert capsys.readouterr().err.endswith(found)


def test_layers_read_as_they_run(wide, tmp_path, monkeypatch):
    _, model = exported(wide, tmp_path / "m.gguf", "q4_0")
    monkeypatch.setattr(offload, "choose", lambda sizes, free: set())  # whatever the limit: it all fits
    limited = load(tmp_path / "m.gguf", memory_limit=8 << 30)
    assert limited.net.layers[0].mlp.up_proj.weight.blocks.count_nonzero() == 0  # it is in its file
    assert greedy(limited) == greedy(model)


def test_another_head_leaves_the_files_unread(tmp_path):
    folder = checkpoint(tmp_path / "folder", "llama")
    write(load(folder), tmp_path / "m.gguf", "q8_0")
    body = load(tmp_path / "m.gguf", head="none")
    assert body.net.lm_head is None and isinstance(body.net.layers[1].self_attn.v_proj.weight, GGUF)
    chain.apply(body, ["transfer"])
    assert body.net.lm_head is None and set(body.trainable()) == {"score.weight.dense"}


def test_what_llama_cpp_does_not_know_is_refused(root, tmp_path):
    import tiny

    for family in ("opt", "bert", "gemma2"):
        with pytest.raises(UserError, match=f"{family} with head .* cannot be written"):
            write(load(tiny.folder(root, family)), tmp_path / "m.gguf", "f16")
    with pytest.raises(UserError, match="does not know bias, alibi or serial attention in Falcon"):
        write(load(tiny.folder(root, "falcon")), tmp_path / "m.gguf", "f16")
    with pytest.raises(UserError, match="a WordLevel tokenizer"):
        write(load(tiny.folder(root, "llama")), tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(wide, tmp_path, monkeypatch):
    model = load(wide)
    monkeypatch.setattr(GGUF, "quantize", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write(model, tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def opened_by_llama_cpp(path):
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)


def same_reply(llama, model, prompt: str, kind: str, tokens: int = 24) -> list[bool]:
    """At which of burnish's greedy tokens, fed to llama.cpp, the likeliest leads by more than rounding: there it must
    be llama.cpp's, and what comes before the first other one must be what llama.cpp generates alone."""
    ids = model.tokenizer(prompt)["input_ids"]
    assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids
    reply = burnish.generate(model, [prompt], GenerationConfig(max_new_tokens=tokens))[0].ids
    fed = ids + reply[:-1]
    with torch.no_grad():
        ours = model.net.logits(chain.forward(model, {"input_ids": torch.tensor([fed])})).float()[0, len(ids) - 1 :]
    assert ours.argmax(1).tolist() == reply
    best = ours.topk(2).values
    sure = (best[:, 0] - best[:, 1] > CLOSE.get(kind, 0.3) * ours.std()).tolist()
    llama.reset()
    llama.eval(fed)
    theirs = llama.scores[len(ids) - 1 : len(fed)].argmax(1).tolist()
    assert all(their == own for their, own, kept in zip(theirs, reply, sure, strict=True) if kept), (theirs, reply)
    alone = [*sure, False].index(False)
    assert list(islice(llama.generate(ids, temp=0), alone)) == reply[:alone]
    return sure


@pytest.mark.parametrize("kind", TYPES)
def test_llama_cpp_writes_the_same_text(tmp_path, kind):
    _, model = exported("pebble", tmp_path / "pebble.gguf", kind)
    llama = opened_by_llama_cpp(tmp_path / "pebble.gguf")
    review = "Review: The food was cold and the staff was rude. Sentiment:"
    for prompt in (PROMPT, "<|user|>Where?<|end|><|assistant|>", review, "a  b\n 1234 it's"):
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == model.tokenizer(prompt)["input_ids"]
    for prompt in (PROMPT, "<|user|>Where?<|end|><|assistant|>", review):
        sure = same_reply(llama, model, prompt, kind)
        assert sum(sure) >= len(sure) / 3
    reply = llama(PROMPT, max_tokens=2, temperature=0)["choices"][0]["text"]
    assert [reply] == greedy(model, [PROMPT], 2) == [" lentils."]
    llama.close()


@pytest.mark.parametrize(
    ("case", "kind", "width"),
    [
        ("qwen2", "q8_0", {"hidden_size": 64, "intermediate_size": 96}),
        ("qwen3", "q4_k", {"hidden_size": 256, "intermediate_size": 256}),
        ("gpt2", "q4_0", {"n_embd": 64}),
        ("gpt_neox", "bf16", {}),
        ("falcon", "q8_0", {"hidden_size": 64}),
        ("mpt", "q4_0", {"d_model": 64, "n_heads": 4}),
    ],
)
def test_llama_cpp_writes_the_same_text_from_other_families(tmp_path, case, kind, width):
    family, changes = CASES[case]
    folder = checkpoint(tmp_path / "folder", family, **{**changes, **width})
    _, model = exported(folder, tmp_path / "m.gguf", kind)
    assert CODES[kind] in {stored.code for stored in read_gguf(tmp_path / "m.gguf").tensors.values()}
    llama = opened_by_llama_cpp(tmp_path / "m.gguf")
    sure = [same_reply(llama, model, text, kind, tokens=10) for text in (TEXT, *TEXTS)]
    assert sum(map(sum, sure)) >= 10
    llama.close()


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(tmp_path, case):
    family, changes = CASES[case]
    _, model = exported(checkpoint(tmp_path / "folder", family, **changes), tmp_path / "m.gguf", "f32")
    llama = opened_by_llama_cpp(tmp_path / "m.gguf")
    ids = llama.tokenize(TEXT.encode(), add_bos=False, special=True)
    assert ids == model.tokenizer(TEXT)["input_ids"]
    llama.eval(ids)
    want = logits(model)
    assert (torch.tensor(llama.scores[: len(ids)]) - want).norm() < 2e-3 * want.norm()  # its cache is float16
    llama.close()


@pytest.mark.parametrize("file_type", [2, 7, 8, 9, 15, 17, 18])  # Q4_0, Q8_0, Q5_0, Q5_1, Q4_K_M, Q5_K_M, Q6_K
@pytest.mark.parametrize("inner", [512, 704])  # whole blocks of 256, and not: there llama.cpp takes Q5_0, Q5_1, Q8_0
def test_files_that_llama_cpp_quantised(tmp_path, file_type, inner):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = checkpoint(tmp_path / "folder", "llama", **{**WIDE, "intermediate_size": inner})
    model, _ = exported(folder, tmp_path / "m.gguf", "f32")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, 1
    paths = [str(tmp_path / name).encode() for name in ("m.gguf", "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, options) == 0
    theirs = load(tmp_path / "theirs.gguf")
    got, want = logits(theirs), logits(model)
    assert (got - want).norm() < (0.5 if file_type in (2, 15) else 0.25) * want.norm()
    llama = opened_by_llama_cpp(tmp_path / "theirs.gguf")
    llama.eval(tokenizer()(TEXT)["input_ids"])
    assert (
        inner == 512
        or file_type < 15
        or {6, 7, 8} & {x.code for x in read_gguf(tmp_path / "theirs.gguf").tensors.values()}
    )
    assert (torch.tensor(llama.scores[: len(got)]) - got).norm() < 0.05 * got.norm()
    llama.close()
