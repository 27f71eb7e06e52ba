"""Shared set-up: one torch thread, no network, no kernels chosen by time, repeatable examples."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["BURNISH_MEASURE_KERNELS"] = "0"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="burnish-tests-")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the optional experiments' data: $BURNISH_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BURNISH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the optional experiments' data is not at {folder}; set BURNISH_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Where the tiny checkpoints of `tests/tiny.py` are written, once per session."""
    return tmp_path_factory.mktemp("tiny")
