"""docs/techniques.md: complete and current, and what it says about data is so."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import technique_page

from burnish.bench.relations import read_relations
from burnish.chain import TECHNIQUES, technique
from burnish.store.data import wrong_choices


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "techniques.md"
    rewrite = "run: python tests/technique_page.py > docs/techniques.md"
    assert page.read_text(encoding="utf-8") == technique_page.page(), rewrite


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_has_a_source_and_every_option_a_meaning(name: str) -> None:
    module = technique(name)
    assert "arXiv" in technique_page.source(module), "name the source as 'Source: ...' in the docstring"
    assert len(technique_page.purpose(module)) < 120
    silent = [option.name for option in fields(module.Config) if not option.metadata.get("help")]
    assert not silent, "say what it means: name: type = option(default, meaning)"


def test_the_page_s_examples_of_data_are_read(tmp_path: Path) -> None:
    row, relation = re.findall(r"\n\n    (\{.+?\})\n\n", technique_page.DATA, re.S)
    assert wrong_choices(json.loads(row)) == [" good"]
    (tmp_path / "capital.json").write_text(relation)
    (found,) = read_relations(tmp_path)
    assert (found.name, found.facts) == ("capital", (("France", "Paris"), ("Peru", "Lima")))
