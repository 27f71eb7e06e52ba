"""A network whose weights are read as it runs gives what the plain one gives, to the last bit."""

from __future__ import annotations

import gc
import itertools
import json
import random
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import tiny_foreign
import torch

from burnish import apply, chain, cli
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.place import offload
from burnish.place.offload import Offload
from burnish.place.reading import Reader
from burnish.place.units import buffer_size, choose
from burnish.store.checkpoint import load, save
from burnish.store.mixed import load_adapters

PLENTY = 1 << 36
FOREIGN = ("stablelm", "gpt_bigcode", "mamba", "electra", "bart", "m2m_100")
IDS = torch.tensor([[5, 9, 70, 6, 7, 30], [31, 5, 5, 12, 79, 8]])
GREEDY = GenerationConfig(max_new_tokens=6, min_new_tokens=6)


@pytest.fixture
def nothing_stays(monkeypatch):
    """Whatever the limit: the tiny models all fit."""
    monkeypatch.setattr(offload, "choose", lambda sizes, free: set())


def folder(root, family: str):
    return (tiny_foreign if family in tiny_foreign.CONFIGS else tiny).folder(root, family)


def mover(model) -> Offload:
    """What moves a model's weights."""
    return next(iter(model.net._forward_pre_hooks.values())).__self__


@torch.inference_mode()
def answers(model) -> list[torch.Tensor]:
    """Logits of three forwards, the second of other rows."""
    found = []
    for ids in (IDS, IDS.flip(0)[:, :4], IDS):
        given = {"input_ids": ids} if not model.spec.paired else {"inputs_embeds": model.net.embed(ids)}
        source = {"source_embeds": model.net.embed(ids.flip(1))} if model.spec.paired else {}
        found.append(model.net.logits(model.net(**given, **source)))
    return found


def same(model, plain) -> None:
    for found, expected in zip(answers(model), answers(plain), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.SEQ2SEQ, *FOREIGN])
@pytest.mark.parametrize("stays", [set(), {1, 2}])
def test_logits_equal_the_plain_networks(root, monkeypatch, family, stays):
    monkeypatch.setattr(offload, "choose", lambda sizes, free: stays)
    plain, model = load(folder(root, family)), load(folder(root, family), memory_limit=PLENTY)
    same(model, plain)
    if plain.spec.generates:
        prompts = [Example([5, 9, 33], [-100] * 3), Example([6, 7, 8, 9, 10, 11], [-100] * 6)]
        wanted = [done.ids for done in generate(plain, prompts, GREEDY)]
        assert [done.ids for done in generate(model, prompts, GREEDY)] == wanted
    assert sum(unit.nbytes for unit in mover(model).units) > 40_000  # there is something to read


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_cast_and_turned(root, nothing_stays, family):
    """GPT-2's matrices are stored as (in, out)."""
    for dtype in (torch.bfloat16, torch.float16):
        source = folder(root, family)
        same(load(source, dtype, memory_limit=PLENTY), load(source, dtype))


@pytest.mark.parametrize("technique", ["int8", "fp8", "nf4"])
def test_quantised_weights_are_read_as_they_are_stored(root, nothing_stays, tmp_path, technique):
    source = save(apply(load(folder(root, "llama")), technique), tmp_path)
    model, plain = load(source, memory_limit=PLENTY), load(source)
    same(model, plain)
    stored = {p.entry.path.name: p.entry.dtype for unit in mover(model).units for p in unit.parts}
    assert stored["burnish.safetensors"] is not None and len(mover(model).units) == 5
    dense = load(folder(root, "llama"), memory_limit=PLENTY)
    assert sum(u.nbytes for u in mover(model).units) < sum(u.nbytes for u in mover(dense).units) / 1.8


def lora(model):
    model = apply(model, {"lora": {"r": 4}})
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


def test_an_adapter_whose_base_is_quantised_at_loading_is_refused(root, tmp_path):
    source = save(lora(apply(load(folder(root, "llama")), "nf4")), tmp_path)
    with pytest.raises(UserError, match="memory_limit: .* quantised as it is loaded"):
        load(source, memory_limit=PLENTY)


@pytest.mark.parametrize("techniques", [[], ["gptq"]])
def test_adapters_stay_in_memory(root, nothing_stays, tmp_path, techniques):
    """Alone, with a quantised base, and loaded under a name."""
    source = save(lora(apply(load(folder(root, "llama")), techniques)), tmp_path)
    model, plain = load(source, memory_limit=PLENTY), load(source)
    same(model, plain)
    assert not any("lora" in part.leaf for unit in mover(model).units for part in unit.parts)
    if not techniques:
        named = [load_adapters(load(folder(root, "llama"), **x), {"a": source}) for x in ({}, {"memory_limit": PLENTY})]
        for one in named:
            one.adapters.active = "a"
        prompts = [Example([5, 9, 33, 8], [-100] * 4)]
        assert generate(named[1], prompts, GREEDY)[0].ids == generate(named[0], prompts, GREEDY)[0].ids


def test_shards_are_read(root, nothing_stays, tmp_path):
    reference = tiny.reference("llama")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    same(load(tmp_path, memory_limit=PLENTY), load(tmp_path))


def test_a_forward_that_was_broken_off_is_followed_by_a_whole_one(root, nothing_stays, monkeypatch):
    plain, model = load(folder(root, "llama")), load(folder(root, "llama"), memory_limit=PLENTY)
    same(model, plain)
    mlp = model.net.layers[1].mlp
    with monkeypatch.context() as broken:
        broken.setattr(mlp, "act", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answers(model)
    same(model, plain)


def test_what_stays_follows_the_request(root, monkeypatch):
    """A longer request leaves room for less, and the replies stay the same; there is no way back."""
    monkeypatch.setattr(offload, "SLACK", 0)
    monkeypatch.setattr(offload.machine, "resident_memory", lambda: 0)
    source = folder(root, "llama")
    free, plain = mover(load(source, memory_limit=PLENTY)), load(source)
    sizes = [unit.nbytes for unit in free.units]
    model = load(source, memory_limit=offload.BUFFERS + free.activations(plain.net, 1, 3, 8) + sum(sizes))
    monkeypatch.setattr(offload.machine, "resident_memory", lambda: held(model))
    kept = []
    for size in (3, 7, 13, 3):
        prompts = [Example([5] * size, [-100] * size)]
        assert generate(model, prompts, GREEDY)[0].ids == generate(plain, prompts, GREEDY)[0].ids
        kept.append(sum(unit.nbytes for unit in mover(model).units if unit.stays))
    assert kept[0] == sum(sizes) > kept[1] > kept[2] == kept[3] >= 0
    with pytest.raises(UserError, match=r"memory_limit: 4 MiB are too few for this model and request, which need"):
        generate(model, [Example([5] * 50, [-100] * 50)] * 9, GREEDY)


def held(model) -> int:
    """Bytes of a model's weights that are there."""
    units = [unit for unit in mover(model).units if unit.stays and unit.memory is not None]
    return mover(model).buffer.nbytes + sum(unit.nbytes for unit in units)


@pytest.mark.parametrize("seed", range(5))
def test_as_much_stays_as_fits(seed):
    """Against every division there is; a greedy one comes near."""
    draw = random.Random(seed)
    sizes = [draw.choice([2, 7, 7, 13]) for _ in range(8)]
    for free in range(0, sum(sizes) + 3, 5):
        fitting = []
        for flags in itertools.product((False, True), repeat=len(sizes)):
            kept = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
            others = [size for size, flag in zip(sizes, flags, strict=True) if not flag]
            around = [a + b for a, b in zip(others, others[1:] + others[:1], strict=True)]
            if kept + (max(around) if len(others) > 1 else sum(others)) <= free:
                fitting.append(kept)
        found = choose(sizes, free)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        kept = sum(sizes[index] for index in found)
        assert kept + buffer_size([x for index, x in enumerate(sizes) if index not in found]) <= free
        assert max(fitting) - max(sizes) <= kept <= max(fitting)


def test_the_memory_goes_with_the_model(root, nothing_stays):
    """By counting references, without waiting for the collector of cycles."""
    model = load(folder(root, "llama"), memory_limit=PLENTY)
    answers(model)
    gone = weakref.ref(mover(model))
    gc.disable()
    del model
    gc.enable()
    assert gone() is None


def test_it_only_runs(root, tmp_path):
    model = load(save(lora(load(folder(root, "llama"))), tmp_path / "lora"), memory_limit=PLENTY)
    for work in (
        lambda: apply(model, "int8"),
        lambda: chain.merge(model),
        lambda: save(model, tmp_path / "copy"),
        lambda: model.net(IDS),
        lambda: train(model, [Example([5, 6, 7], [5, 6, 7])], TrainConfig(max_steps=1)),
    ):
        with pytest.raises(UserError, match="only runs, most of it is in its files; load it without the limit"):
            work()
    assert not (tmp_path / "copy" / "model.safetensors").exists()


def test_a_file_that_shrinks_is_told(root, nothing_stays, tmp_path):
    source = tiny.write(tmp_path, tiny.reference("llama"))
    model = load(source, memory_limit=PLENTY)
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:40_000])
    with pytest.raises(UserError, match="ends inside a tensor"):
        answers(model)
    file.write_bytes(whole)
    same(model, load(source))
    file.write_bytes(whole[:2_000])
    with pytest.raises(UserError, match="ends inside a tensor"), torch.inference_mode():
        model.net.embed(IDS)
    file.write_bytes(whole)
    same(model, load(source))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("8 apples", "--memory_limit: expected bytes, as 64MB, found '8 apples'"),
        ("-1GB", "memory_limit: -954 MiB are too few"),
        ("40MB", "memory_limit: 38 MiB are too few for this model and request, which need "),
    ],
)
def test_limits_that_are_refused(root, capsys, limit, message):
    words = ["generate", str(folder(root, "llama")), "--prompt", "the cat", f"--memory_limit={limit}"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert f"generate: {message}" in error


def test_models_without_layers_are_refused(root):
    with pytest.raises(UserError, match="no layers that could be read"):
        load(folder(root, "mixtral"), memory_limit=PLENTY)


def test_the_command_line(root, nothing_stays, capsys):
    words = ["generate", str(folder(root, "llama")), "--prompt", "the cat sees", "--json", "--max_new_tokens", "5"]
    assert cli.main(words) == 0 and cli.main([*words, "--memory-limit", "60GB"]) == 0
    plain, limited = map(json.loads, capsys.readouterr().out.splitlines())
    assert plain == limited


class Side:
    """A stream that is done at once."""

    def wait_stream(self, other) -> None:
        self.waited = True

    def record_event(self) -> str:
        assert self.waited, "a copy waits for those who still read the place"
        return "copied"


@pytest.fixture
def waited(monkeypatch):
    """What the main stream of a GPU that is none waited for."""
    found: list[str] = []
    main = SimpleNamespace(wait_event=found.append, wait_stream=lambda side: found.append("all"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return found


def test_the_way_of_a_gpu_by_the_hosts_memory(root, monkeypatch, nothing_stays, waited):
    """Units are read once, into the host's memory, and copied from there; streams and events are replaced."""
    plain, model = load(folder(root, "llama")), load(folder(root, "llama"), memory_limit=PLENTY)
    moved = mover(model)
    moved.side = Side()
    same(model, plain)
    assert waited.count("copied") == 3 * len(moved.units)
    read = Reader.read
    monkeypatch.setattr(Reader, "read", None)  # nothing is read again
    for stays in (set(), {1}):
        moved.drop()
        moved.divide(stays)
        same(model, plain)
    assert [unit.host is None for unit in moved.units] == [False, True, False, False, False]
    monkeypatch.setattr(Reader, "read", read)  # but for what the host's memory no longer has
    moved.drop()
    moved.divide({2})
    same(model, plain)


def test_a_read_that_failed_leaves_nothing_to_copy(root, nothing_stays, tmp_path, waited):
    source = tiny.write(tmp_path, tiny.reference("llama"))
    model = load(source, memory_limit=PLENTY)
    mover(model).side = Side()
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:40_000])
    for _ in range(2):
        with pytest.raises(UserError, match="ends inside a tensor"):
            answers(model)
    (source / "model.safetensors").write_bytes(whole)
    same(model, load(source))


def test_the_buffer_is_given_back_when_no_copy_writes_there(root, nothing_stays, waited):
    model = load(folder(root, "llama"), memory_limit=PLENTY)
    mover(model).side = Side()
    answers(model)
    before = waited.count("all")
    mover(model).drop()
    assert waited.count("all") == before + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(root, nothing_stays):
    for family in ("llama", "gpt2", "t5"):
        source = folder(root, family)
        plain, model = load(source, device="cuda"), load(source, device="cuda", memory_limit=PLENTY)
        prompts = [Example([5, 9, 33], [-100] * 3)]
        assert generate(model, prompts, GREEDY)[0].ids == generate(plain, prompts, GREEDY)[0].ids
