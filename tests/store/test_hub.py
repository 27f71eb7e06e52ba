"""Hub ids, against a hub on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import tiny
from fake_hub import serve

LOAD = "import sys, burnish; m = burnish.load(sys.argv[1]); print(m.parameter_count(), m.path)"


@pytest.fixture(scope="module")
def hub(root, tmp_path_factory):
    models = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny.folder(root, "gpt2"), models / "someone/small")
    (models / "someone/small/onnx").mkdir()
    (models / "someone/small/onnx/model.safetensors").write_bytes(b"other")
    (models / "someone/pickled").mkdir()
    shutil.copy(tiny.folder(root, "gpt2") / "config.json", models / "someone/pickled")
    (models / "someone/pickled/pytorch_model.bin").write_bytes(b"pickle")
    with serve(models) as (url, server):
        yield url, server


def load(url, home, name, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name], env={**variables, **environment}, capture_output=True, text=True
    )
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


def test_a_download_survives_a_cut_and_is_found_offline(hub, tmp_path):
    url, server = hub
    server.cut = 4000
    out, error = load(url, tmp_path, "someone/small", HF_TOKEN="hf_secret")
    assert out.endswith(" someone/small"), error
    fetched = [path.rpartition("/")[2] for method, path, *_ in server.asked if method == "GET" and "/resolve/" in path]
    assert sorted(fetched) == [
        *("config.json", "generation_config.json", "model.safetensors", "model.safetensors"),  # the cut one once more
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert {token for _, path, token in server.asked if "someone" in path} == {"Bearer hf_secret"}
    server.asked.clear()
    assert load(url, tmp_path, "someone/small")[0] == out
    assert not [path for method, path, *_ in server.asked if method == "GET" and "/resolve/" in path]
    server.asked.clear()
    assert load(url, tmp_path, "someone/small", HF_HUB_OFFLINE="1")[0] == out
    assert not server.asked


@pytest.mark.parametrize(
    ("name", "environment", "reason"),
    [
        ("someone/missing", {}, "someone/missing: no such folder, and the hub has no such model"),
        ("someone/small@v9", {}, "someone/small: the hub knows no revision 'v9' of it"),
        ("someone/pickled", {}, "its repository has no safetensors; a pickle can run code"),
        ("someone/other", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and it is not downloaded"),
        ("someone/other", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, tmp_path, name, environment, reason):
    out, error = load(hub[0], tmp_path, name, **environment)
    assert not out
    assert reason in error
