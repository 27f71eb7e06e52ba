"""The preview of what is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from burnish.config import UserError, from_mapping
from burnish.store import preview as previews
from burnish.store.data import Example, encode_rows
from burnish.store.tokenizer import save_tokenizer, train_tokenizer

TALK = [{"role": "user", "content": "capital?"}, {"role": "assistant", "content": "Berga"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["What is the capital of Anland? Berga is its capital."] * 5, 400)


def test_preview_marks_learnt_and_pseudo_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = encode_rows([{"messages": TALK}, {"messages": TALK}], tokenizer, 64)
    soft = Example(
        [0, 0, *tokenizer("é\nx")["input_ids"]], [-100] * 5 + tokenizer("x")["input_ids"], slots=[0, 1] + [-1] * 4
    )
    shown = previews.preview([chat[0], soft, chat[1]], tokenizer, 2)
    text = shown.plain
    count = len(tokenizer("Berga<|end|>")["input_ids"])
    assert "<|user|>capital?<|end|><|assistant|>[[Berga<|end|>]]" in text
    assert f"example 1: {len(chat[0].ids)} tokens, {count} learnt ({count / len(chat[0].ids):.1%})" in text
    assert "<P0><P1>é\\n\n[[x]]" in text
    assert "example 3" not in text
    green = [span for span in shown.spans if "green" in str(span.style)]
    assert "[[Berga<|end|>]]" in [text[span.start : span.end] for span in green]


def test_preview_command(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(tokenizer, tmp_path / "model")
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"messages": TALK}) for _ in range(5)))
    settings = {"data": str(data), "model": str(tmp_path / "model"), "n": 2}
    assert previews.run(from_mapping(previews.PreviewConfig, settings, "test")) == 0
    out = capsys.readouterr().out
    assert "5 rows, format messages" in out and "example 2" in out and "example 3" not in out
    assert "all rows: " in out
    assert previews.run(from_mapping(previews.PreviewConfig, settings | {"json": True}, "test")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["format"], len(report["examples"])) == (5, "messages", 2)
    assert report["examples"][0]["pieces"][-1] == ["learnt", "Berga<|end|>"]
    with pytest.raises(UserError, match="row 6"):
        data.write_text(data.read_text() + "\n" + json.dumps({"messages": TALK[:1]}))
        previews.run(from_mapping(previews.PreviewConfig, settings, "test"))


def test_preview_fits_any_console(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = previews.preview(encode_rows([{"text": "[bold]x[/bold] " * 9}], tokenizer, 256), tokenizer, 1)
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(shown, soft_wrap=True)
    assert "[bold]x[/bold]" in captured.get()
