"""The n-gram model against a loop over dictionaries, and through everybody's loading, generation and evaluation."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict

import pytest
import torch

from burnish import chain
from burnish.bench.measure import measure
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.generate import GenerationConfig, generate
from burnish.model.bundle import Model
from burnish.model.ngram import count, ngram_spec
from burnish.store.checkpoint import load

VOCAB, ORDER, BEGIN = 7, 4, 7


def texts(seed: int = 0, number: int = 60) -> list[list[int]]:
    """Texts in which a token mostly decides the next."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        ids = [int(torch.randint(VOCAB, (), generator=generator))]
        while len(ids) < 3 + int(torch.randint(9, (), generator=generator)):
            noise = int(torch.randint(3, (), generator=generator))
            ids.append((2 * ids[-1] + len(ids) % 2 + noise) % (VOCAB - 1))  # the last token is rarely seen
        found.append(ids)
    return found


class Reference:
    """Modified Kneser-Ney by its definition, with tuples as keys."""

    def __init__(self, corpus: list[list[int]]):
        raw: list[Counter] = [Counter() for _ in range(ORDER + 1)]
        for text in corpus:
            marked = (BEGIN, *text)
            for k in range(1, ORDER + 1):
                raw[k].update(marked[i : i + k] for i in range(len(marked) - k + 1))
        self.counts = [Counter(), *raw[1:]]
        for k in range(1, ORDER):
            left = defaultdict(set)
            for gram in raw[k + 1]:
                left[gram[1:]].add(gram[0])
            self.counts[k] = Counter({gram: len(left[gram]) if gram in left else c for gram, c in raw[k].items()})
        del self.counts[1][BEGIN,]
        self.cuts = [(0.0,) * 3]
        for k in range(1, ORDER + 1):
            n = [max(1, sum(c == i for c in self.counts[k].values())) for i in range(1, 5)]
            y = n[0] / (n[0] + 2 * n[1])
            raw_cuts = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
            self.cuts.append(tuple(min(max(d, 0.05), i + 0.95) for i, d in enumerate(raw_cuts)))

    def cut(self, k: int, c: int) -> float:
        return self.cuts[k][min(c, 3) - 1]

    def p(self, history: tuple[int, ...], word: int) -> float:
        k = len(history) + 1
        below = 1 / VOCAB if k == 1 else self.p(history[1:], word)
        found = {gram[-1]: c for gram, c in self.counts[k].items() if gram[:-1] == history}
        if not found:
            return below
        total = sum(found.values())
        own = (found[word] - self.cut(k, found[word])) / total if word in found else 0.0
        return own + sum(self.cut(k, c) for c in found.values()) / total * below


@pytest.fixture(scope="module")
def net():
    return count(ngram_spec({"vocab_size": VOCAB, "order": ORDER}), texts())


def test_probabilities_are_the_definitions(net):
    reference = Reference(texts())
    for text in texts(seed=1, number=12):
        logits = net.logits(net(torch.tensor([text])))[0]
        assert torch.allclose(logits.exp().sum(-1), torch.ones(len(text)))
        for end in range(1, len(text) + 1):
            history = (BEGIN, *text[:end])[-(ORDER - 1) :]
            want = [math.log(reference.p(history, word)) for word in range(VOCAB)]
            assert logits[end - 1].tolist() == pytest.approx(want, abs=1e-5)


def test_padding_packing_and_the_cache_change_nothing(net):
    one, two = texts(seed=2, number=2)
    alone = [net.logits(net(torch.tensor([text])))[0] for text in (one, two)]
    length = max(len(one), len(two)) + 2
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.bool)
    for row, text in enumerate((one, two)):
        ids[row, length - len(text) :], mask[row, length - len(text) :] = torch.tensor(text), True
    padded = net.logits(net(ids, attention_mask=mask))
    for row, want in enumerate(alone):
        assert torch.equal(padded[row, -len(want) :], want)
    places = torch.tensor([[*range(len(one)), *range(len(two))]])
    packed = net.logits(net(torch.tensor([one + two]), position_ids=places))
    assert torch.equal(packed[0], torch.cat(alone))
    cache = net.new_cache(2, 0)
    first = net.logits(net(ids[:, :-2], attention_mask=mask[:, :-2], cache=cache))
    cache.select(torch.tensor([1, 0]))
    rest = [net.logits(net(ids.flip(0)[:, i, None], cache=cache)) for i in (-2, -1)]
    assert torch.equal(torch.cat([first, torch.cat(rest, dim=1).flip(0)], dim=1)[mask], padded[mask])


def test_what_it_is_not(net):
    with pytest.raises(UserError, match="has no parameters to train"):
        chain.apply(Model(net, None, {}), ["full"])
    with pytest.raises(UserError, match="2 to 10 tokens"):
        ngram_spec({"vocab_size": 5, "order": 1})
    with pytest.raises(UserError, match="no text to count"):
        count(ngram_spec({"vocab_size": 5}), [])


def test_from_the_shell(tmp_path, capsys):
    data = tmp_path / "t.jsonl"
    words = ["a cat runs", "a dog runs", "a cat sleeps", "the cat runs"]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in words * 5))
    out = tmp_path / "out"
    assert main(["pretrain", "--model", "ngram", "--data", str(data), "--output-dir", str(out)]) == 0
    assert "n-grams; saved to" in capsys.readouterr().out
    assert main(["eval", str(out), "--data", str(data), "--json"]) == 0
    perplexity = next(iter(json.loads(capsys.readouterr().out).values()))
    assert perplexity["metric"] == "perplexity"
    model = load(out)
    examples = [model.tokenizer(text)["input_ids"] for text in ("a cat", "the")]
    assert all(len(ids) for ids in examples)
    assert generate(model, ["the cat"], GenerationConfig(max_new_tokens=8))[0].text.strip() == "runs"
    found = measure(model, {"name": "x", "data": str(data), "eval_data": str(data)})
    assert 1 < found < 3
    compared = [
        "compare",
        "--model",
        "pebble",
        "--seeds",
        "0",
        "--output-dir",
        str(tmp_path / "compare"),
        "--no-controls",
    ]
    rows = "[{name: counts, model: " + str(out) + "}]"
    tasks = "[{name: t, data: " + str(data) + ", eval_data: " + str(data) + "}]"
    quick = ["--latency", "{runs: 1, warmups: 0, new_tokens: 2, prompt_tokens: 4}"]
    assert main([*compared, "--rows", rows, "--tasks", tasks, *quick]) == 0
    (row,) = json.loads((tmp_path / "compare" / "results.json").read_text())["rows"]
    assert row["status"] == "ok" and row["quality"]["mean"] == pytest.approx(found) and row["latency_ms"]["mean"] > 0
    assert main(["tune", str(out), "--data", str(data), "--output-dir", str(tmp_path / "no")]) == 2
