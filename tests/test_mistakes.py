"""A user's mistake gives one line that says what, where and what to do, and exit status 2."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny

from burnish.cli import main

REPLY = {"role": "assistant", "content": "runs"}


@pytest.fixture
def places(root, tmp_path, monkeypatch):
    """A folder with good and bad things in it, made the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.folder(root, "llama"), "good")
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    (tmp_path / "good" / "chat_template.jinja").write_text(template)
    rows = [{"prompt": "the cat", "completion": " runs"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "odd.jsonl").write_text('{"question": "the cat", "reply": "runs"}\n')
    turns = [{"messages": [{"role": "user", "content": "the cat"}, *reply]} for reply in ([REPLY], [])]
    (tmp_path / "masked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    shutil.copytree(tiny.folder(root, "bert", "none"), "bare")
    shutil.copytree(tiny.folder(root, "bert", "classification"), "classifier")
    classes = [{"text": "the cat runs", "label": "yes"}, {"text": "the dog", "label": "no"}]
    (tmp_path / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in classes))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "typo.yaml").write_text("model: good\nlearnin_rate: 1\n")
    shutil.copytree("good", "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    shutil.copytree("good", "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "lamma"}')
    shutil.copytree("good", "cut")
    shutil.copytree("good", "mute")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    data = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[: len(data) // 2])
    return tmp_path


TUNE = ["tune", "good", "--data", "rows.jsonl", "--output-dir", "out", "--max-steps", "1"]
CLASSES = ["--data", "classes.jsonl", "--text-columns", "text", "--label-column", "label"]
CLASSIFY = ["tune", "bare", *CLASSES, "--output-dir", "out", "--max-steps", "1"]
COMPARE = ["compare", "good", "--output-dir", "out", "--tasks", "[{name: x, data: rows.jsonl, eval_data: rows.jsonl}]"]
MISTAKES = [
    (["tun", "good"], "did you mean 'tune'"),
    ([*TUNE, "--lerning-rate", "1"], "did you mean"),
    (["tune", "typo.yaml"], "typo.yaml: learnin_rate: unknown key (did you mean 'learning_rate'?)"),
    ([*TUNE, "--techniques", "lorra"], "did you mean 'lora'"),
    ([*TUNE, "--techniques", "[{lora: {rr: 3}}]"], "rr"),
    ([*TUNE, "--techniques", "[{lora: {target_modules: [q_prj]}}]"], "did you mean 'q_proj'"),
    ([*TUNE, "--data", "odd.jsonl"], "columns found: question, reply"),
    ([*TUNE, "--data", "odd.jsonl", "--columns", "{prompt: question, completion: anser}"], "anser"),
    ([*TUNE, "--data", "empty.jsonl"], "empty.jsonl"),
    ([*TUNE, "--data", "masked.jsonl"], "row 2"),
    ([*TUNE, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["generate", "nowhere", "--prompt", "x"], "nowhere"),
    (["generate", ".", "--prompt", "x"], "config.json"),
    (["generate", "pickled", "--prompt", "x"], "pickle"),
    (["generate", "broken", "--prompt", "x"], "lamma"),
    (["generate", "cut", "--prompt", "x"], "copy or download it again"),
    (["generate", "mute", "--prompt", "x"], "mute: holds no tokenizer; copy tokenizer.json"),
    (["generate", "good", "--prompt", "x", "--top-p", "3"], "top_p"),
    (["merge", "good", "--output-dir", "out"], "good: is a plain checkpoint already"),
    ([*TUNE, "--model", "bare"], "this bert encoder has no head, so it answers nothing; put one on"),
    ([*TUNE, "--techniques", "[ia3, choice_loss]"], "training row 1 has no 'choices'"),
    ([*TUNE, "--text-columns", "prompt"], "name the column of the class"),
    ([*TUNE, "--learning-rate", "-1"], "learning_rate: must be 0 or more, is -1.0"),
    ([*TUNE, "--weight-decay", "-1"], "weight_decay: must be 0 or more"),
    ([*TUNE, "--warmup-steps", "-1"], "warmup_steps: must be 0 or more"),
    ([*TUNE, "--warmup-ratio", "1.5"], "warmup_ratio: a share of the steps is needed, 0 to 1, not 1.5"),
    ([*TUNE, "--warmup-ratio", "-0.5"], "warmup_ratio: a share of the steps is needed"),
    ([*TUNE, "--techniques", "[{lora: {lora_alpha: 0}}]"], "lora_alpha is 0.0; it must be above 0"),
    ([*TUNE, "--techniques", "[{lora: {alpha_pattern: {q_proj: -1}}}]"], "q_proj is -1.0; it must be above 0"),
    ([*TUNE, "--techniques", "[{prompt_tuning: {num_virtual_tokens: 64}}]"], "is 64, and the model has 64 positions"),
    ([*TUNE, "--techniques", "[{prefix_tuning: {num_virtual_tokens: 99}}]"], "is 99, and the model has 64 positions"),
    ([*TUNE, "--techniques", "[{p_tuning_v2: {num_virtual_tokens: 64}}]"], "is 64, and the model has 64 positions"),
    ([*TUNE, "--techniques", "[{prompt_tuning: {init_text: ''}}]"], "init_text is empty"),
    ([*TUNE, "--techniques", "[{prefix_tuning: {init_text: ''}}]"], "init_text is empty"),
    ([*CLASSIFY, "--packing"], "classified examples cannot be packed"),
    ([*CLASSIFY, "--label-column", "lable"], "did you mean 'label'"),
    ([*CLASSIFY, "--techniques", "[{transfer: {head: lm}}]"], "label_column: it asks for a classifier"),
    (
        [*CLASSIFY, "--techniques", "[{transfer: {label_names: ['yes', maybe]}}]"],
        "yes, maybe are not the data's labels",
    ),
    (
        [*CLASSIFY, "--techniques", "[{transfer: {label_names: ['no', 'yes', maybe]}}]"],
        "are not the data's labels, no, yes",
    ),
    (["eval", "classifier", "--data", "rows.jsonl"], "the model classifies rows, which exact_match does not measure"),
    (["eval", "classifier"], "measure it on rows with their texts and class"),
    (["eval", "bare", "--data", "rows.jsonl"], "the model has no head"),
    (["eval", "good", *CLASSES], "the model tells words, which accuracy does not measure"),
    (["eval", "classifier", *CLASSES], "label 'no' is none of the model's classes: LABEL_0, LABEL_1"),
    (["eval", "good", "--label-column", "label"], "give --data rows.jsonl"),
    (["eval", "classifier", "--task", "lama"], "this model has a classifier's head; take a language model"),
    (["eval", "bare", "--task", "lama"], "this model has no head; take a language model"),
    (["generate", "good", "--values", "{subject: x}"], "no template that takes subject"),
    ([*COMPARE, "--output-dir", "rows.jsonl"], "output_dir: rows.jsonl cannot be made: File exists; choose another"),
    ([*COMPARE, "--max-steps", "-3"], "max_steps: must be at least 1, is -3"),
    ([*COMPARE, "--max-steps", "0"], "max_steps: must be at least 1, is 0"),
    ([*COMPARE, "--rows", "[{name: a, max_steps: -3}]"], "row 'a': max_steps: must be 0"),
    ([*COMPARE, "--rows", "[{name: a, learning_rate: -1}]"], "row 'a': learning_rate: must be 0"),
    ([*COMPARE, "--rows", "[{name: a, techniques: [ia3, choice_loss]}]"], "row 'a': choice_loss needs rows with"),
    (["quantize", "good", "--method", "nf5", "--output-dir", "out"], "nf4"),
    (["quantize", "good", "--output-dir", "pickled"], "not empty"),
    (["compare", "--model", "good", "--tasks", "neer"], "did you mean 'near'"),
    (["data", "preview", "masked.jsonl", "--model", "good"], "row 2"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words)[:60] for words, _ in MISTAKES])
def test_one_line_and_status_2(places, capsys, words, message):
    before = sorted(path for path in places.rglob("*"))
    assert main(words) == 2
    said = capsys.readouterr()
    error = said.err.strip().splitlines()[-1]
    assert error.startswith("burnish") and message in error
    assert "parameters train" not in said.out
    assert sorted(path for path in places.rglob("*")) == before, "something was left behind"


def test_not_enough_memory_is_predicted(places, capsys, monkeypatch):
    monkeypatch.setattr("burnish.device.available_memory", lambda *_: 1000)
    assert main(TUNE) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "needs about" in error[0]
    assert not (places / "out").exists()


def test_an_output_folder_with_another_run_is_refused(places, capsys):
    assert main(TUNE) == 0
    assert main([*TUNE, "--learning-rate", "0.5"]) == 2
    assert "learning_rate" in capsys.readouterr().err.strip().splitlines()[-1]
