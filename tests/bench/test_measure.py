"""Quality metrics against generation, and latency."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_foreign
import torch

import burnish
from burnish.bench.job import fit, quality
from burnish.bench.latency import LatencyConfig, latency
from burnish.bench.measure import answered, measure, ranked
from burnish.bench.tasks import load_task, parse_task
from burnish.cli import main
from burnish.engine.generate import GenerationConfig, generate
from burnish.model.example import Example


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_one_forward_decides_what_greedy_generation_gives(root, family):
    model = burnish.load(tiny.folder(root, family))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, 80, (n,), generator=generator).tolist() for n in (3, 5, 8, 4)]
    open_examples = [Example(ids, [-100] * len(ids)) for ids in prompts]
    replies = [g.ids for g in generate(model, open_examples, GenerationConfig(max_new_tokens=3))]
    right = [Example(p + r, [-100] * len(p) + r) for p, r in zip(prompts, replies, strict=True)]
    others = [7 if r[0] != 7 else 8 for r in replies]
    wrong = [Example(p + [other], [-100] * len(p) + [other]) for p, other in zip(prompts, others, strict=True)]
    assert answered(model, right) == [True] * 4
    assert answered(model, wrong) == [False] * 4


def test_perplexity_is_exp_of_the_mean_loss(root, tmp_path):
    model = burnish.load(tiny.folder(root, "gpt2"))
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "the cat sees a red fish"}\n{"text": "where is the dog ?"}\n')
    found = measure(model, {"name": "text", "data": str(path), "eval_data": str(path)})
    total, count = 0.0, 0
    for text in ("the cat sees a red fish", "where is the dog ?"):
        ids = torch.tensor([*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id])[None]
        with torch.no_grad():
            logits = model.net.logits(model.net(ids))[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert found == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_a_masked_model_is_not_shown_what_it_is_to_tell(root, tmp_path):
    model, theirs = burnish.load(tiny.folder(root, "bert")), tiny.reference("bert")
    marks = model.tokenizer.cls_token_id, model.tokenizer.mask_token_id, model.tokenizer.sep_token_id
    prompts = ["is the cat red ?", "who runs ?", "the small bird", "what", "2 3 4"]
    rows, path = [], tmp_path / "rows.jsonl"
    for prompt in prompts:
        ids = [marks[0], *model.tokenizer(prompt, add_special_tokens=False)["input_ids"], marks[1], marks[2]]
        with torch.no_grad():
            told = int(theirs(input_ids=torch.tensor([ids])).logits[0, -2].argmax())
        word = " " + model.tokenizer.convert_ids_to_tokens(told)
        if model.tokenizer(word, add_special_tokens=False)["input_ids"] == [told]:
            rows.append({"prompt": prompt, "completion": word})
    assert len(rows) > 2
    task = {"name": "mine", "data": str(path), "eval_data": str(path)}
    for right, wanted in ((rows, 1.0), ([{**row, "completion": " nine"} for row in rows], 0.0)):
        path.write_text("".join(json.dumps(row) + "\n" for row in right))
        assert measure(model, task) == wanted
    path.write_text("".join(json.dumps({"text": "the cat sees a red fish"}) + "\n" for _ in range(5)))
    assert 20 < measure(model, task) < 500  # of 80 words, untrained; shown the words it would be told them
    assert measure(model, task) == measure(model, task)


def test_eval_verb(root, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "the cat", "completion": " runs"}\n' * 3)
    assert main(["eval", str(tiny.folder(root, "llama")), "--data", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(path)]
    assert found["metric"] == "exact_match" and found["rows"] == 3 and found["value"] in (0.0, 1.0)


@pytest.mark.parametrize(("family", "head"), [("llama", ""), ("bert", "classification"), ("bert", "none")])
def test_latency(root, family, head):
    found = latency(burnish.load(tiny.folder(root, family, head)), LatencyConfig(8, 2, 1, 4))
    times = found["latency_ms"]
    assert 0 < times["p50"] <= times["p95"] and times["std"] >= 0 and found["tokens_per_second"] > 0


CHOICES = [" yes", " no", " a big fish", " the dog sees a bird"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "stablelm", "bert", "t5"])
def test_rank_classification_is_a_loop_over_choices(root, tmp_path, family):
    foreign = family in tiny_foreign.CONFIGS
    model = burnish.load((tiny_foreign if foreign else tiny).folder(root, family))
    theirs = (tiny_foreign if foreign else tiny).reference(family)
    prompts = ["is the cat red ?", "who runs ?", "the small bird", "where is the dog ? answer :", "what", "2 3 4"]
    rows = [
        {"prompt": prompt, "completion": right, "options": CHOICES, "number": i}
        for i, prompt in enumerate(prompts)
        for right in CHOICES
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def score(prompt: str, choice: str) -> float:
        before, after = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, choice))
        if family == "bert":  # [CLS] prompt [MASK]... [SEP]
            marks = model.tokenizer.cls_token_id, model.tokenizer.mask_token_id, model.tokenizer.sep_token_id
            given = {"input_ids": torch.tensor([[marks[0], *before, *[marks[1]] * len(after), marks[2]]])}
            judged = slice(len(before) + 1, -1)
        elif family == "t5":
            source = [*before, model.tokenizer.eos_token_id]
            given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[0, *after[:-1]]])}
            judged = slice(None)
        else:
            given, judged = {"input_ids": torch.tensor([before + after])}, slice(len(before) - 1, -1)
        with torch.no_grad():
            logs = theirs(**given).logits.log_softmax(-1)[0, judged]
        return sum(logs[i, token].item() for i, token in enumerate(after)) / len(after)

    best = [max(CHOICES, key=lambda choice: score(row["prompt"], choice)) == row["completion"] for row in rows]
    task = load_task(
        parse_task(
            {
                "name": "mine",
                "data": str(path),
                "eval_data": str(path),
                "metric": "rank_classification",
                "columns": {"choices": "options"},
            }
        )
    )
    assert ranked(model, task.encode(model, task.test)) == best and sum(best) == len(prompts)
    assert measure(model, task) == pytest.approx(1 / len(CHOICES))


def test_rank_classification_from_the_command_line(root, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "is it red ?", "completion": " yes", "choices": [" yes", " no"]}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "completion": " no"}) + "\n")
    model = str(tiny.folder(root, "llama"))
    verb = ["eval", model, "--metric", "rank_classification", "--json"]
    assert main([*verb, "--data", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)[str(path)] == {"metric": "rank_classification", "value": 0.5, "rows": 2}
    assert main([*verb, "--task", "[entailment]", "--max-rows", "6"]) == 0
    found = json.loads(capsys.readouterr().out)["entailment"]
    assert found["metric"] == "rank_classification" and found["rows"] == 6
    assert main([*verb, "--task", "[facts]"]) == 2
    assert "test row 1: metric rank_classification needs a prompt" in capsys.readouterr().err
    path.write_text(json.dumps({**row, "choices": [" red", " no"]}) + "\n" + json.dumps(row) + "\n")
    assert main([*verb, "--data", str(path)]) == 2
    assert "test row 1" in capsys.readouterr().err


@pytest.mark.parametrize("classified", [False, True])
def test_techniques_see_the_rows_that_they_train_on(root, tmp_path, classified):
    """A prompt that starts from the class words finds them, in every job."""
    rows = [{"prompt": "the cat", "completion": word, "word": word} for word in ("yes", "no", "yes")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "mine", "data": str(data), "eval_data": str(data)}
    head: list = []
    if classified:
        task |= {"text_columns": ["prompt"], "label_column": "word"}
        head = [{"transfer": {"num_labels": 2, "label_names": ["no", "yes"]}}]
    techniques = [*head, {"prompt_tuning": {"num_virtual_tokens": 2, "init": "labels"}}]
    common = {"model": str(tiny.folder(root, "llama")), "techniques": techniques, "train": {"max_steps": 1}}
    assert quality({**common, "task": task, "seeds": [0]})["quality"]["seeds"]
    assert fit({**common, "shape": [2, 8], "artifact": str(tmp_path / "fit")})["train_memory_bytes"] >= 0
    given = ["--model", common["model"], "--data", str(data), "--output-dir", str(tmp_path / "tuned")]
    given += ["--techniques", json.dumps(techniques), "--max-steps", "1", "--learning-rate", "1e-30"]
    given += ["--text-columns", "[prompt]", "--label-column", "word"] if classified else []
    assert main(["tune", *given]) == 0
    words = ["no", "yes"] if classified else ["yes", "no"]
    model = burnish.load(tmp_path / "tuned")
    ids = torch.tensor([6 + tiny.WORDS.index(word) for word in words])
    prompt = model.net.techniques["prompt_tuning"].embedding
    torch.testing.assert_close(prompt.detach(), model.net.embed_tokens(ids).detach())


def test_auto_ranks_choices_of_own_rows(tmp_path):
    rows = [{"prompt": "is it red ?", "completion": " yes", "choices": [" yes", " no"]}] * 2
    some = [*rows, {**rows[0], "choices": None}]
    for name, lines, metric in (("all", rows, "rank_classification"), ("some", some, "exact_match")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
        assert load_task(parse_task({"name": "x", "data": str(path), "eval_data": str(path)})).metric == metric
    assert load_task(parse_task("reviews")).metric == "exact_match"
