"""The generation engine: against transformers, against forwards without a cache, and in batches."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import burnish
from burnish import cli
from burnish.chain import apply, forward
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.engine.detokenizer import BROKEN, Detokenizer
from burnish.engine.generate import generate, stream
from burnish.engine.reply import Generation, eos_ids
from burnish.model.bundle import Context, Model
from burnish.model.example import IGNORE, Example
from burnish.store.batch import collate
from burnish.store.checkpoint import save
from burnish.store.tokenizer import train_tokenizer

PROMPTS = ["the cat sees", "question : where is the big red dog ?", "paris", "who likes a small blue fish , yes or no"]
CHAINS = {
    "plain": [],
    "prompt": [{"prompt_tuning": {"num_virtual_tokens": 4, "init": "random"}}],
    "p": [{"p_tuning": {"template": "[P*2] question : {prompt} [P*2] answer :"}}],
    "prefix": [{"prefix_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16}}],
    "prefix+prompt": ["prefix_tuning", {"prompt_tuning": {"num_virtual_tokens": 2}}],
}
TEMPLATE = "{% for m in messages %}{{ m.content }} : {% endfor %}{% if add_generation_prompt %}answer{% endif %}"
LONG = GenerationConfig(max_new_tokens=12, min_new_tokens=12)


def load(root, family: str = "llama", techniques=(), **changes) -> Model:
    """A tiny model whose layers say more than its embeddings, so that it does not just repeat the last token, and
    which hardly ever says an id that is no word; with such changes of its config."""
    model = burnish.load(tiny.folder(root, family, **changes))
    with torch.no_grad():
        for parameter in model.net.layers.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
        model.net.lm_head.weight.dense[len(model.tokenizer) :] = 0
    if techniques:
        apply(model, techniques, Context(seed=3))
        for parameter in model.net.techniques.parameters():  # far enough from nothing to matter
            parameter.data.normal_(0, 0.8, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def example(model: Model, text: str, virtual_tokens: int | None = None) -> Example:
    ids = model.tokenizer(text)["input_ids"]
    return Example(ids, [IGNORE] * len(ids), {"prompt": text}, virtual_tokens=virtual_tokens)


def without_cache(model: Model, prompt: Example, count: int) -> list[int]:
    """Greedy tokens by one whole forward for each, end tokens never chosen."""
    from burnish.engine.order import encode

    found: list[int] = []
    for _ in range(count):
        whole = replace(prompt, ids=prompt.ids + found, labels=prompt.labels + found)
        with torch.no_grad():
            logits = model.net.logits(forward(model, collate(encode(model, [whole]), 0))[0, -1])
        logits[list(eos_ids(model))] = float("-inf")
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_greedy_equals_transformers(root, family, penalty):
    model, reference = burnish.load(tiny.folder(root, family)), tiny.reference(family)
    got = generate(model, PROMPTS, GenerationConfig(max_new_tokens=20, repetition_penalty=penalty))
    for text, done in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        want = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, repetition_penalty=penalty
        )
        assert done.ids == want[0, ids.shape[1] :].tolist()
        assert done.prompt_tokens == ids.shape[1]
        assert done.finish_reason == ("eos" if done.ids[-1] == 1 else "length")


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_batch_gives_each_prompt_what_it_gets_alone_and_without_a_cache(root, family, chain):
    model = load(root, family, CHAINS[chain])
    lengths = [None, 1, 0, 3] if chain != "plain" else [None] * 4
    prompts = [example(model, text, length) for text, length in zip(PROMPTS, lengths, strict=True)]
    config = replace(LONG, max_new_tokens=8, min_new_tokens=8)
    together = [done.ids for done in generate(model, prompts, config)]
    assert together == [generate(model, [prompt], config)[0].ids for prompt in prompts]
    assert together == [without_cache(model, prompt, 8) for prompt in prompts]
    if chain != "plain":
        plain = [done.ids for done in generate(load(root, family), prompts, config)]
        assert together != plain


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_penalty_counts_a_rows_own_tokens_and_no_padding(root, family):
    model = load(root, family, CHAINS["prompt"])
    config = replace(LONG, repetition_penalty=1.5)
    assert generate(model, PROMPTS, config) == [generate(model, [text], config)[0] for text in PROMPTS]


def test_a_row_samples_the_same_anywhere_and_copies_differ(root):
    model = load(root)
    config = replace(LONG, do_sample=True, temperature=2.0, top_k=50, top_p=0.95, seed=7)
    alone = [generate(model, [text], config)[0] for text in PROMPTS]
    assert generate(model, PROMPTS, config) == alone
    assert generate(model, PROMPTS[::-1], replace(config, batch_size=3)) == alone[::-1]
    copies = generate(model, [PROMPTS[0]] * 3, config)
    assert copies[0] == alone[0] and len({tuple(done.ids) for done in copies}) == 3
    assert generate(model, PROMPTS, replace(config, seed=8)) != alone


def test_streamed_pieces_make_up_the_reply(root):
    model = load(root)
    pieces = list(stream(model, PROMPTS, LONG))
    for row, done in enumerate(generate(model, PROMPTS, LONG)):
        mine = [piece for piece in pieces if piece.row == row]
        assert [piece.token for piece in mine] == done.ids
        assert "".join(piece.text for piece in mine) == done.text
        assert [piece.done for piece in mine] == [None] * 11 + [done]
        assert done.text.split() == model.tokenizer.decode(done.ids, skip_special_tokens=True).split()


def test_a_stop_text_ends_the_reply_wherever_it_stands(root):
    model = load(root)
    full = generate(model, PROMPTS[:1], LONG)[0].text
    for start in range(0, len(full) - 9, 3):
        for size in (1, 4, 9):
            stop = full[start : start + size]
            config = replace(LONG, stop=["never there", stop, stop + " nor this"])
            pieces = list(stream(model, PROMPTS[:1], config))
            done = pieces[-1].done
            assert done.text == "".join(piece.text for piece in pieces) == full[: full.find(stop)]
            assert done.finish_reason == "stop"
    almost = full[-3:] + "!"
    assert generate(model, PROMPTS[:1], replace(LONG, stop=[almost]))[0].text == full


def test_end_tokens_of_the_folder_and_stop_texts_that_are_special(root, tmp_path):
    model = load(root)
    ids = generate(model, PROMPTS[:1], LONG)[0].ids
    end = ids[4]
    save(replace(model, path="", generation_config={"eos_token_id": [2, end]}), tmp_path)
    model = burnish.load(tmp_path)
    assert eos_ids(model) == {1, 2, end}
    done = generate(model, PROMPTS[:1], GenerationConfig(max_new_tokens=12))[0]
    assert (done.finish_reason, done.ids) == ("eos", ids[: ids.index(end) + 1])
    assert model.tokenizer.convert_ids_to_tokens(end) not in done.text.split()
    assert end not in generate(model, PROMPTS[:1], LONG)[0].ids

    model = load(root)
    model.net.logits = lambda hidden: torch.eye(80)[[2] * len(hidden)]
    done = generate(model, PROMPTS[:1], GenerationConfig(stop=["x", "<unk>"]))[0]
    assert (done.ids, done.text, done.finish_reason) == ([2], "", "stop")


def test_rows_that_have_ended_are_dropped(root, monkeypatch):
    model = load(root)
    full = generate(model, PROMPTS, LONG)
    words = [model.tokenizer.convert_ids_to_tokens(done.ids) for done in full]
    sizes = []
    whole = model.net.forward
    monkeypatch.setattr(
        model.net, "forward", lambda **inputs: sizes.append(len(inputs["inputs_embeds"])) or whole(**inputs)
    )
    config = replace(LONG, stop=[words[0][1], words[1][6]], repetition_penalty=1.0)
    some = generate(model, PROMPTS, config)
    for done, want in zip(some, full, strict=True):
        ends = [want.text.find(stop) for stop in config.stop if stop in want.text]
        assert done.text == want.text[: min(ends, default=None)]
    assert sizes[0] == 4 and sizes[-1] < 4


def test_prompts_beyond_the_batch_size_wait(root):
    model = load(root)
    assert generate(model, PROMPTS * 2, replace(LONG, batch_size=3)) == generate(model, PROMPTS * 2, LONG)
    assert generate(model, [], LONG) == []


def test_a_prompt_longer_than_the_model_was_made_for(root):
    model = load(root)  # rotary
    room = model.spec.max_positions
    long = Example([3] * (room + 1), [IGNORE] * (room + 1))
    with pytest.raises(UserError, match=f"prompt 2: {room + 1} tokens exceed the {room} that the model was made for"):
        generate(model, [PROMPTS[0], long], GenerationConfig(max_new_tokens=2))
    short = Example(long.ids[1:], long.labels[1:])
    assert len(generate(model, [short], GenerationConfig(max_new_tokens=2, min_new_tokens=2))[0].ids) == 2


def test_learned_positions_are_a_limit(root):
    model = load(root, "gpt2", CHAINS["prefix"])
    config = GenerationConfig(max_new_tokens=57)  # 4 before, 3 in the prompt, 64 in all
    assert len(generate(model, PROMPTS[:1], replace(config, min_new_tokens=57))[0].ids) == 57
    with pytest.raises(UserError, match="prompt 1: 7 tokens and max_new_tokens=58 exceed the model's 64 positions"):
        stream(model, PROMPTS[:1], replace(config, max_new_tokens=58))


def test_mode_and_gradients_are_as_before(root):
    model = load(root)
    model.net.train()
    pieces = stream(model, PROMPTS, LONG)
    next(pieces)
    inside = []
    model.net.register_forward_pre_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    next(pieces), list(stream(model, PROMPTS, LONG))
    assert all(inside) and len(inside) > 3
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not model.net.training
    pieces.close()
    assert model.net.training
    list(stream(model, PROMPTS, LONG))
    assert model.net.training


def test_compute_dtype_and_no_tokenizer(root):
    model = load(root)
    model.net.compute_dtype = torch.bfloat16
    prompt = example(model, PROMPTS[0])
    ids = generate(model, [prompt], GenerationConfig())[0].ids
    model.tokenizer = None
    done = generate(model, [prompt], GenerationConfig(max_new_tokens=5))[0]
    assert done.ids == ids[:5] and done.text == ""


def test_chat_prompts_and_labelled_examples(root):
    model = load(root)
    model.tokenizer.chat_template = TEMPLATE
    talk = [{"role": "user", "content": "where is the dog"}, {"role": "assistant", "content": "rome"}]
    want = generate(model, ["where is the dog : rome : answer"], LONG)[0]
    assert generate(model, [talk], LONG)[0] == want
    labelled = example(model, "where is the dog : rome : answer paris")
    labelled.labels[-1] = labelled.ids[-1]
    assert generate(model, [labelled], LONG)[0] == want


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"min_new_tokens": 65}, "min_new_tokens: 65 is above max_new_tokens=64"),
        (
            {"temperature": 0.0, "do_sample": True},
            "temperature: must be from 1e-12 to 1e.12, is 0.0; .* do_sample: false",
        ),
        ({"temperature": float("inf"), "do_sample": True}, "temperature: must be from"),
        ({"top_p": 1.5, "do_sample": True}, "top_p: must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k: must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be from 1e-12 to 1e.12, is 0.0; 1 is none"),
        ({"presence_penalty": float("-inf")}, "presence_penalty: must be from -1e.12 to 1e.12, is -inf"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: must be from"),
        ({"stop": "text"}, "stop: a list"),
        ({"stop": ["a", ""]}, "stop: a list of non-empty texts"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"top_k": 50}, "top_k: acts only .* do_sample"),
        ({"min_p": 0.1}, "min_p: acts only .* do_sample"),
        ({"num_beams": 4, "do_sample": True}, "beam search draws nothing"),
        ({"num_beams": 4, "num_beam_groups": 3}, "4 beams do not make 3 equal groups"),
        ({"diversity_penalty": 1.0}, "set num_beam_groups"),
        ({"penalty_alpha": 0.5}, "set top_k to 2 or more"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 4}, "beam search and speculation do not go together"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**settings)


def test_what_cannot_be_continued(root):
    with pytest.raises(UserError, match="bert encoder .* decoder"):
        generate(burnish.load(tiny.folder(root, "bert")), PROMPTS)
    with pytest.raises(UserError, match="'classification' cannot continue"):
        generate(burnish.load(tiny.folder(root, "llama", "classification")), PROMPTS)
    model = load(root)
    with pytest.raises(UserError, match="list of prompts"):
        generate(model, PROMPTS[0])
    with pytest.raises(UserError, match="prompt is empty"):
        generate(model, [""])
    for token in (80, -1):
        with pytest.raises(UserError, match=f"prompt 2: token {token} is none of the model's, 0 to 79; encode"):
            generate(model, ["the cat", Example([7, token, 8], [IGNORE] * 3)])
    with pytest.raises(UserError, match="no chat template; add"):
        generate(model, [[{"role": "user", "content": "the cat"}]])
    model.tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(UserError, match="rejects this conversation: no users here"):
        generate(model, [[{"role": "user", "content": "the cat"}]])


BYTES = train_tokenizer(["the cat sees the dog, the dog sees the cat"] * 3, 300)


def pieces_of(words: Detokenizer, ids: list[int]) -> list[str]:
    return [words.push(token) for token in ids] + [words.flush()]


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=40))
def test_text_comes_as_it_would_all_at_once(ids):
    want = BYTES.decode(ids, skip_special_tokens=True).rstrip(BROKEN)
    assert "".join(pieces_of(Detokenizer(BYTES), ids)) == want


@given(st.text(alphabet="aé語🙂 the", min_size=1, max_size=15), st.data())
def test_characters_come_whole_and_a_stop_text_never_in_parts(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    assert not any(BROKEN in piece for piece in pieces_of(Detokenizer(BYTES), BYTES(text)["input_ids"]))
    words, shown = Detokenizer(BYTES, stop=[stop, "no such"]), ""
    for token in BYTES(text)["input_ids"]:
        shown += words.push(token)
        assert text[: text.find(stop)].startswith(shown)
        if words.stopped:
            break
    assert words.stopped and shown == text[: text.find(stop)]


def test_the_prompt_decides_how_a_first_word_is_spelt():
    tokenizer = tiny.tokenizer()
    cat = tokenizer.convert_tokens_to_ids("cat")
    assert Detokenizer(tokenizer).push(cat) == "cat"
    assert Detokenizer(tokenizer, tokenizer("who sees the")["input_ids"]).push(cat) == " cat"
    start, *rest = BYTES("語")["input_ids"]
    assert "".join(pieces_of(Detokenizer(BYTES, [start]), rest)) == "語"


@pytest.fixture
def folder(root, tmp_path):
    """A checkpoint with a chat template."""
    model = load(root)
    model.tokenizer.chat_template = TEMPLATE
    save(replace(model, path=""), tmp_path / "model")
    return str(tmp_path / "model")


def burn(*words: str, typed: str = "", monkeypatch=None) -> int:
    monkeypatch and monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return cli.main(list(words))


def test_generate_verb(folder, tmp_path, capsys, monkeypatch):
    model = burnish.load(folder)
    want = generate(model, PROMPTS, GenerationConfig(max_new_tokens=9))
    few = ("--max_new_tokens", "9")
    assert burn("generate", folder, "--prompt", PROMPTS[0], *few) == 0
    assert capsys.readouterr().out == want[0].text + "\n"
    assert burn("generate", folder, *few, typed=PROMPTS[0] + "\n", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == want[0].text + "\n"

    (tmp_path / "prompts").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]))
    assert burn("generate", folder, "--prompt_file", str(tmp_path / "prompts"), *few) == 0
    assert f"> {PROMPTS[1]}\n{want[1].text}\n\n" in capsys.readouterr().out
    assert burn("generate", folder, "--prompt_file", str(tmp_path / "prompts"), *few, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.pop("prompt") for line in lines] == PROMPTS
    assert [Generation(**line) for line in lines] == want

    talk = [{"role": "user", "content": PROMPTS[0]}]
    reply = generate(model, [talk], GenerationConfig(max_new_tokens=9, do_sample=True, top_k=5))[0].text
    assert burn("generate", folder, "--prompt", PROMPTS[0], "--chat", "--do_sample", "--top_k", "5", *few) == 0
    assert capsys.readouterr().out == reply + "\n"


def test_chat_verb(folder, capsys, monkeypatch):
    model = burnish.load(folder)
    config = GenerationConfig(max_new_tokens=6)
    messages: list[dict[str, str]] = [{"role": "system", "content": "big dog"}]
    replies = []
    for asked in ("the cat", "is red ?"):
        messages.append({"role": "user", "content": asked})
        replies.append(generate(model, [messages], config)[0].text)
        messages.append({"role": "assistant", "content": replies[-1]})
    typed = "the cat\nis red ?\n\n/reset\nthe cat\n"
    for end in ("", "/exit\nthe cat\n"):
        words = ("chat", folder, "--max_new_tokens", "6", "--system", "big dog")
        assert burn(*words, typed=typed + end, monkeypatch=monkeypatch) == 0
        out = capsys.readouterr().out
        assert [part for part in out.replace("\n", "").split("> ") if part] == [*replies, replies[0]]


def test_verbs_say_what_is_wrong(root, folder, tmp_path, capsys, monkeypatch):
    assert burn("chat", str(tiny.folder(root, "llama"))) == 2
    assert "no chat template; add" in capsys.readouterr().err
    assert burn("generate", folder, "--prompt", "the cat", "--prompt_file", "x") == 2
    assert "both given" in capsys.readouterr().err
    assert burn("generate", folder, "--prompt_file", str(tmp_path / "none")) == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert burn("generate", folder) == 2
    assert "no prompt: give --prompt" in capsys.readouterr().err
    assert burn("generate", folder, "--prompt", "a", "--top_k", "3") == 2
    assert "set do_sample" in capsys.readouterr().err
    assert burn("generate", "--help") == burn("chat", "--help") == 0
    assert "--repetition_penalty" in capsys.readouterr().out
