"""The verdict's logic, the table, and the page as a parser and an attacker see them."""

import copy
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy
import pytest
from rich.console import Console

from burnish.bench import report
from burnish.bench.report_plots import count, duration, lower_is_better, millis, quality, size
from burnish.bench.report_verdict import by_task, finite, judgements

VOID = {"meta", "link", "br", "hr", "img", "input"}


def make(name, mean, *, spread=0.01, n=3, memory=500 << 20, latency=10.0, artifact=1 << 20, **more):
    """A row; the seeds are `mean` exactly, since only `mean`, `spread` and their number decide."""
    metric, trained = more.pop("metric", "accuracy"), more.pop("trained", True)
    row = {"name": name, "techniques": [name], "task": "sentiment", "status": "ok", "error": None}
    row |= {"control": False, "energy_joules": None}
    row["quality"] = {"metric": metric, "mean": mean, "spread": spread, "seeds": [mean] * n}
    row["latency_ms"] = {"mean": latency, "std": 0.4, "p50": latency, "p95": latency and latency * 1.1}
    row |= {"tokens_per_second": 80.0, "peak_memory_bytes": memory, "artifact_bytes": artifact}
    row |= {"trainable_parameters": 1000 * trained, "trainable_share": 0.01 * trained}
    row["train_seconds"] = 30.0 if trained else None
    row["curve"] = [[step, 3 / (1 + step / 10)] for step in range(1, 50 * trained)]
    row["examples"] = [[8, mean and mean / 2, spread], [300, mean, spread]] if trained else []
    return row | more


def base(mean, **more):
    return make("base", mean, spread=0.0, techniques=[], trained=False, **more)


def failed(name, status="failed", error="exploded", task="sentiment"):
    nothing = dict.fromkeys(make(name, 0.5))
    return nothing | {"name": name, "task": task, "status": status, "error": error}


def results(*rows, **budget):
    machine = {"cpu": "a cpu", "threads": 2, "packages": {"torch": "2.13", "absent": None}}
    return {"environment": machine, "budget": budget, "rows": list(rows)}


def winner(*rows, **budget):
    (judgement,) = judgements(results(*rows, **budget))
    return judgement.winner and judgement.winner["name"]


class Page(HTMLParser):
    """Collects tags and text, and fails on a tag closed out of order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def words(self):
        return " ".join(data for tag, data in self.text if tag not in ("style", "script"))

    def embedded(self):
        scripts = [data for tag, data in self.text if tag == "script"]
        assert len(scripts) == 2
        return json.loads(scripts[0])

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


# The verdict


def test_a_clear_lead_wins_and_is_told_with_its_margin():
    rows = [base(0.6), make("lora", 0.9), make("ia3", 0.8, memory=1)]
    assert winner(*rows) == "lora"
    (text,) = report.verdict(results(*rows))
    assert text.startswith("sentiment: lora wins with accuracy 90.0% ± 1.0, 10.0 points ahead of ia3 (80.0% ± 1.0)")
    assert "It beats base (60.0% ± 0.0)." in text


def test_noise_is_two_standard_errors_of_the_difference():
    limit = 2 * math.sqrt(0.01**2 + 0.02**2) / math.sqrt(3)
    for distance, expected in ((limit * 0.99, "cheap"), (limit * 1.01, "dear")):
        rows = [make("dear", 0.9, spread=0.02, memory=900), make("cheap", 0.9 - distance, spread=0.01, memory=100)]
        assert winner(*rows) == expected


def test_a_row_does_not_win_by_wild_seeds():
    limit = 2 * math.sqrt(2 * 0.01**2 / 3)  # two rows with the best one's spread
    for distance, expected in ((limit * 0.99, "cheap"), (limit * 1.01, "dear")):
        rows = [make("dear", 0.9, spread=0.01, memory=900), make("cheap", 0.9 - distance, spread=0.3, memory=100)]
        assert winner(*rows) == expected


@pytest.mark.parametrize(
    ("dear", "cheap", "word"),
    [
        ({"memory": 900 << 20}, {"memory": 100 << 20}, "peak memory 100 MiB against 900 MiB"),
        ({"latency": 20.0}, {"latency": 10.0}, "latency 10.0 ms against 20.0 ms"),
        ({"artifact": 8 << 20}, {"artifact": 1 << 20}, "artefact 1.00 MiB against 8.00 MiB"),
        ({"memory": 505 << 20, "latency": 20.0}, {"memory": 510 << 20, "latency": 10.0}, "latency 10.0 ms"),
        ({"memory": 900 << 20, "latency": 10.0}, {"memory": 100 << 20, "latency": 99.0}, "peak memory 100 MiB"),
        ({"memory": None}, {"memory": 100 << 20}, ""),
    ],
)
def test_a_tie_goes_to_the_cheaper_row_and_says_so(dear, cheap, word):
    rows = [make("dear", 0.905, **dear), make("cheap", 0.9, **cheap)]
    assert winner(*rows) == "cheap"
    (text,) = report.verdict(results(*rows))
    assert "cheap wins a tie on accuracy: its 90.0% ± 1.0 is within the seeds' noise of dear (90.5% ± 1.0)" in text
    assert word in text


def test_rows_that_cost_the_same_tie_without_an_invented_reason():
    (text,) = report.verdict(results(make("a", 0.9), make("b", 0.9)))
    assert "no cost tells them apart" in text


def test_a_row_that_another_beats_is_not_tied_with_the_best():
    noisy, cheap = make("noisy", 0.92, spread=0.1, memory=999), base(0.9, memory=1)
    assert winner(noisy, cheap) == "base"
    assert winner(noisy, make("steady", 0.91, spread=0.001), cheap) == "noisy"


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"max_memory_bytes": 600 << 20}, "peak memory 900 MiB, limit 600 MiB"),
        ({"max_latency_ms": 15.0}, "latency 20.0 ms, limit 15.0 ms"),
        ({"max_artifact_bytes": 2 << 20}, "artefact 5.00 MiB, limit 2.00 MiB"),
        ({"max_train_seconds": 60}, "training 1 min 30 s, limit 1 min 00 s"),
    ],
)
def test_the_budget_excludes_and_says_what_would_lead(budget, reason):
    big = make("full", 0.95, memory=900 << 20, latency=20.0, artifact=5 << 20, train_seconds=90.0)
    rows = [big, make("lora", 0.9), base(0.5)]
    assert winner(*rows) == "full"
    assert winner(*rows, **budget) == "lora"
    (text,) = report.verdict(results(*rows, **budget))
    assert f"Over the budget: full ({reason})." in text and "Without the budget full (95.0% ± 1.0) would lead." in text


def test_what_was_not_measured_does_not_pass_a_limit():
    rows = [make("unknown", 0.95, memory=None), make("lora", 0.9)]
    assert winner(*rows) == "unknown"
    assert winner(*rows, max_memory_bytes=1 << 40) == "lora"
    untrained = make("prompt", 0.9, train_seconds=None, artifact=None)
    assert winner(untrained, max_train_seconds=1, max_artifact_bytes=1) == "prompt"


def test_every_row_over_the_budget_leaves_no_winner():
    rows = [make("lora", 0.9), base(0.5)]
    assert winner(*rows, max_latency_ms=1.0) is None
    assert "Nothing wins: every row is over the budget." in report.verdict(results(*rows, max_latency_ms=1.0))[0]


def test_a_control_never_wins_and_a_winner_that_does_not_beat_it_says_so():
    rows = [make("lora", 0.7), make("majority", 0.9, control=True, techniques=[]), base(0.7, memory=900 << 20)]
    assert winner(*rows) == "lora"
    (text,) = report.verdict(results(*rows))
    assert "It does not beat majority (90.0% ± 1.0), which is better." in text
    assert "It does not beat base (70.0% ± 0.0): the difference is within the noise." in text
    assert "lora wins sentiment (no better than majority and base)" in Page(report.page(results(*rows))).words()
    assert "no row but the controls finished" in report.verdict(results(rows[1], failed("lora")))[0]


def test_the_base_wins_a_tie_that_it_is_cheapest_in():
    assert winner(base(0.9, memory=100), make("lora", 0.905)) == "base"


@pytest.mark.parametrize("status", ["failed", "oom", "timeout"])
def test_failed_rows_are_named_with_their_reason(status):
    words = {"failed": "failed", "oom": "ran out of memory", "timeout": "ran out of time"}[status]
    rows = results(failed("qlora", status, "no room\nleft"), make("lora", 0.9))
    assert f"Not finished: qlora {words} (no room left)." in report.verdict(rows)[0]
    assert winner(*rows["rows"]) == "lora"


@pytest.mark.parametrize("metric", ["loss", "perplexity", "eval_loss"])
def test_lower_is_better_for_losses(metric):
    rows = [make("good", 1.0, metric=metric, memory=900), make("bad", 2.0, metric=metric, memory=100)]
    assert winner(*rows) == "good"
    assert "1.000 ahead of bad (2.000 ± 0.010)" in report.verdict(results(*rows))[0]
    assert not lower_is_better("exact_match") and not lower_is_better("f1")


def test_one_seed_is_not_taken_for_certainty():
    assert "one seed only" in report.verdict(results(make("lora", 0.9, n=1, spread=None), base(0.5, n=1)))[0]
    assert "one seed only" not in report.verdict(results(make("lora", 0.9), base(0.5, n=1)))[0]


def test_tasks_are_judged_apart():
    facts = {"task": "facts", "metric": "f1"}
    rows = [make("lora", 0.9), make("lora", 0.3, **facts), make("ia3", 0.6, **facts)]
    assert [text.split(" wins")[0] for text in report.verdict(results(*rows))] == ["sentiment: lora", "facts: ia3"]
    with pytest.raises(ValueError, match="sentiment: its rows report different metrics"):
        report.verdict(results(make("a", 0.5), make("b", 0.5, metric="f1")))


# The format


def test_missing_keys_and_foreign_numbers_become_the_schema():
    given = {"a": numpy.float32("nan"), "b": (numpy.int64(3), True, -math.inf), 4: 1.5}
    assert finite(given) == {"a": None, "b": [3, True, None], "4": 1.5}
    (row,) = by_task({"rows": [{"name": "x", "task": "t", "techniques": [{"lora": {"r": 8}}]}]})["t"]
    assert set(row) == set(make("x", 0.5)) and row["techniques"] == ["lora"] and row["latency_ms"]["p95"] is None


def test_units():
    assert [size(v) for v in (None, 0, 1536, 612 << 20)] == ["–", "0 B", "1.50 KiB", "612 MiB"]
    assert [duration(v) for v in (0.31, 42, 200, 3900)] == ["0.31 s", "42 s", "3 min 20 s", "1 h 05 min"]
    assert [millis(v) for v in (14.23, 1200)] == ["14.2 ms", "1.20 s"]
    assert [count(v) for v in (0, 912, 295_000, 1.2e6)] == ["0", "912", "295 k", "1.20 M"]
    assert quality("accuracy", 0.931, 0.004) == "93.1% ± 0.4" and quality("loss", 1.2345) == "1.234"


def test_write_leaves_two_files_without_nan(tmp_path):
    given = results(make("lora", 0.9, latency=math.nan, curve=[[1, 2.0], [2, math.nan], [3, 1.0]]), base(0.5))
    before = copy.deepcopy(given)
    report.write(given, tmp_path / "new")
    report.write(given, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "results.json"]
    text = (tmp_path / "new" / "results.json").read_text("utf-8")
    saved = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert saved["rows"][0]["latency_ms"]["mean"] is None and saved["date"]
    assert repr(given) == repr(before)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    report.write(results(make("old", 0.9)), tmp_path)

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr("burnish.bench.report.os.fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        report.write(results(make("new", 0.9)), tmp_path)
    assert "old" in (tmp_path / "results.json").read_text("utf-8")
    assert len(list(tmp_path.iterdir())) == 2


# The table


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_keeps_names_and_quality(width):
    rows = [make("nf4+lora", 0.92, energy_joules=31.0), base(0.6), failed("[red]b[/]", "oom")]
    rows.append(make("shuffled labels", 0.5, techniques=["lora"], control=True))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.table(results(*rows), width))
    text = console.export_text()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    words = ("sentiment", "accuracy ↑", "nf4+lora", "92.0% ± 1.0", "500 MiB", "10.0 ± 0.4", "wins", "oom", "[red]b[/]")
    for word in words:
        assert word in text
    assert ("joules" in text) == ("P95" in text) == (width == 120)


# The page


def many(n):
    return [make(f"technique_{i:02d}", 0.5 + i / 100, latency=10 + i / 7, memory=(300 + i * i) << 20) for i in range(n)]


ODD = {
    "none": [],
    "all failed": [failed("a"), failed("b", "oom")],
    "single": [make("lora", 0.9)],
    "base alone": [base(0.5)],
    "forty": many(40),
    "zeros": [make("x", 0.5, memory=0, latency=0.0)],
    "nulls": [make("x", math.nan), make("y", 0.5, memory=None, latency=math.nan, spread=math.nan)],
    "wild losses": [make("x", 7.0, metric="loss", curve=[[1, 1e9], [2, 0.1]])],
    "one step": [make("y", -1.0, metric="loss", curve=[[1, 0]])],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_the_page_is_well_formed_for(rows):
    page = Page(report.page(results(*rows, max_latency_ms=12.0)))
    assert len(page.embedded()["rows"]) == len(rows)
    assert page.count("tr") == len(rows) + bool(rows)
    drawn = " ".join(value or "" for _, attrs in page.tags for value in attrs.values())
    assert not re.search(r"\b(nan|inf)\b", drawn, re.IGNORECASE)
    report.table(results(*rows), 120)


def test_the_page_fetches_nothing():
    html = report.page(results(*many(5), base(0.4)) | {"notes": ["see https://example.org"], "recipe": {"model": "x"}})
    page = Page(html)
    assert not re.search(r"@import|url\(", html)
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert (attrs.get(key) or "#").startswith(("#", "data:")), (tag, attrs)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"https://example.org"}
    assert "default-src 'none'" in html


def test_hostile_text_stays_text():
    nasty = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    rows = [make(nasty, 0.9, task=nasty, techniques=[nasty, "b"]), failed(nasty, error=nasty, task=nasty)]
    given = results(*rows) | {"notes": [nasty], "recipe": nasty, "command": [nasty], "date": nasty}
    given["environment"] = {nasty: {nasty: nasty}}
    page = Page(report.page(given))
    assert page.count("img") == 0 and page.count("script") == 2
    assert nasty in page.words()
    assert page.embedded()["rows"][0]["name"] == nasty


def test_the_table_of_the_page_sorts_with_buttons_and_says_how():
    html = report.page(results(make("a", 0.5), make("b", 0.9), failed("c")))
    page = Page(html)
    heads = [attrs for tag, attrs in page.tags if tag == "th" and attrs.get("scope") == "col" and "aria-sort" in attrs]
    assert len(heads) == page.count("button") - 1
    assert [head["aria-sort"] for head in heads].count("descending") == 1
    assert page.count("caption") == 1 and "prefers-reduced-motion" in html and "prefers-color-scheme: dark" in html
    names = [attrs["data-v"] for tag, attrs in page.tags if tag == "th" and attrs.get("scope") == "row"]
    assert names == ["b", "a", "c"]


def test_plots_name_points_apart_and_draw_the_front():
    html = report.page(results(*many(6), base(0.3), make("majority", 0.2, control=True, techniques=[])))
    page = Page(html)
    assert html.count('class="curve"') == 7 + 7  # loss by step, quality by examples
    assert html.count('class="front"') == 3 == html.count('class="ring"')  # by memory, latency, size
    for name in ("technique_00", "technique_05", "base", "majority"):
        assert f">{name}</text>" in html
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in page.tags if tag == "svg")
