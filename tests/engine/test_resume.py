import json
import logging
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import noisy_run, tiny_config, tiny_examples, tiny_model

import burnish
from burnish.config import UserError
from burnish.engine import checkpointing
from burnish.engine.train import train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted():
    torch.set_num_threads(1)
    return noisy_run(None)


def steps(folder):
    return [step for step, _ in checkpointing.checkpoints(folder)]


def assert_same(run, expected):
    model, result = run
    reference, expected_result = expected
    assert result.losses == expected_result.losses
    assert result.eval_losses == expected_result.eval_losses
    assert (result.steps, result.tokens) == (expected_result.steps, expected_result.tokens)
    for name, parameter in model.trainable().items():
        assert torch.equal(parameter, reference.trainable()[name]), name


class Stop(Exception):
    pass


def stop_at(step):
    def progress(now, *_):
        if now == step:
            raise Stop

    return progress


def test_a_killed_run_goes_on_exactly(tmp_path, uninterrupted):
    command = [sys.executable, tiny_runs.__file__, str(tmp_path), "8"]
    environment = os.environ | {"PYTHONPATH": str(Path(burnish.__file__).parents[1])}
    killed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps(tmp_path) == [6, 3]
    (tmp_path / ".checkpoint-9.partial").mkdir()  # as if killed while writing
    assert_same(noisy_run(tmp_path), uninterrupted)
    assert steps(tmp_path) == [10, 9, 6, 3]
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert_same(noisy_run(tmp_path, stop_at(10)), uninterrupted)  # finished: nothing is trained again


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, uninterrupted, caplog, file):
    with pytest.raises(Stop):
        noisy_run(tmp_path, stop_at(8))
    path = tmp_path / "checkpoint-6" / file
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert_same(noisy_run(tmp_path), uninterrupted)
    assert "checkpoint-6 is incomplete" in caplog.text and "checkpoint-3: step 3 of 10" in caplog.text
    assert checkpointing.latest(tmp_path)[0].name == "checkpoint-10"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_resumes(tmp_path, uninterrupted, caplog, number):
    before = signal.getsignal(number)

    def interrupt(step, *_):
        if step == 5:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        noisy_run(tmp_path, interrupt)
    assert signal.getsignal(number) is before
    assert steps(tmp_path) == [5, 3]
    assert "stopped at step 5 of 10: the same command goes on" in caplog.text
    assert_same(noisy_run(tmp_path), uninterrupted)


def test_a_checkpoint_is_readable_data(tmp_path):
    noisy_run(tmp_path)
    names = {path.name for path in (tmp_path / "checkpoint-10").iterdir()}
    assert names == {"trainable.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"}
    state = json.loads((tmp_path / "checkpoint-10" / "state.json").read_text())
    assert state["step"] == 10 and state["run"]["techniques"]["lora"]["r"] == 4
    trained = checkpointing.read(tmp_path / "checkpoint-10", "trainable.safetensors")
    assert trained and all("lora_" in name for name in trained)


def test_a_tied_full_run_resumes_exactly(tmp_path):
    expected = train(tiny_model(), tiny_examples(), tiny_config())
    with pytest.raises(Stop):
        train(tiny_model(), tiny_examples(), tiny_config(tmp_path), progress=stop_at(7))
    result = train(tiny_model(seed=0), tiny_examples(), tiny_config(tmp_path))
    assert result.losses == expected.losses


def test_another_run_is_refused_by_name(tmp_path):
    config = tiny_config(tmp_path, max_steps=2)
    train(tiny_model(), tiny_examples(), config)
    others = {
        r"config\.learning_rate was 0\.01, is 0\.02": (
            tiny_model(),
            tiny_examples(),
            replace(config, learning_rate=0.02),
        ),
        "data was|data differs": (tiny_model(), tiny_examples(seed=3), config),
        "techniques.lora|techniques.full": (tiny_model("lora"), tiny_examples(), config),
        r"model\.intermediate_size was 24, is 32": (tiny_model(intermediate_size=32), tiny_examples(), config),
    }
    for message, (model, examples, changed) in others.items():
        with pytest.raises(UserError, match=f"holds another run.*({message}).*overwrite"):
            train(model, examples, changed)
    train(tiny_model(), tiny_examples(), replace(config, save_steps=1, logging_steps=7))  # output only: the same run
    train(tiny_model(), tiny_examples(), replace(config, learning_rate=0.02, save_steps=0, overwrite=True))
    assert steps(tmp_path) == [2]
    assert checkpointing.latest(tmp_path)[1]["run"]["config"]["learning_rate"] == 0.02


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(tiny_model(), tiny_examples(), tiny_config(tmp_path, save_steps=2, save_total_limit=2))
    assert steps(tmp_path) == [10, 8]


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk_after_first(step, *_):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    config = tiny_config(tmp_path, save_total_limit=1, max_steps=8)
    try:
        with caplog.at_level(logging.WARNING):
            result = train(tiny_model(), tiny_examples(), config, progress=fill_disk_after_first)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.steps == 8
    assert "checkpoint of step 6 not written" in caplog.text and "step 8 not written" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    resumed = train(tiny_model(), tiny_examples(), config)
    assert resumed.losses == result.losses


def test_an_output_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir"):
        train(tiny_model(), tiny_examples(), tiny_config(tmp_path / "file" / "run"))


def test_an_early_stopped_run_stays_stopped_and_keeps_its_best(tmp_path):
    config = tiny_config(
        tmp_path, max_steps=40, learning_rate=0.1, eval_steps=2, early_stopping_patience=2, save_steps=4
    )
    held_out = tiny_examples(6, seed=1)
    first = tiny_model()
    result = train(first, tiny_examples(), config, held_out)
    assert result.steps < 40
    again = tiny_model()
    assert train(again, tiny_examples(), config, held_out).losses == result.losses
    for name, parameter in first.trainable().items():
        assert torch.equal(parameter, again.trainable()[name])
