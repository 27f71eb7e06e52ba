"""Tiny models, data and runs for the tests of the engine; as a script, one run that kills itself: OUTPUT_DIR STEP."""

import os
import random
import signal
import sys
from pathlib import Path

import torch

from burnish.chain import Context, Model, apply
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.model.spec import Spec
from burnish.model.transformer import Transformer

VOCABULARY = 61


def tiny_model(techniques="full", seed=0, **changes):
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    llama = dict(gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, tied=True, max_positions=64)
    shape = dict(family="llama", kind="decoder", intermediate_size=24, **sizes, **llama) | changes
    torch.manual_seed(seed)
    model = Model(Transformer(Spec(**shape)).initialize(0.2), None, {})
    return apply(model, techniques, Context(seed=seed)) if techniques else model


def tiny_examples(count=24, seed=0, longest=14):
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(4, longest))]
        prompt = draw.randrange(1, len(ids) - 1)
        examples.append(Example(ids, [-100] * prompt + ids[prompt:]))
    return examples


def tiny_config(output_dir=None, **changes):
    settings = dict(learning_rate=1e-2, per_device_train_batch_size=2, max_steps=10, logging_steps=1, save_steps=3)
    return TrainConfig(output_dir=output_dir, **(settings | changes))


def noisy_run(output_dir, progress=None):
    """Dropout, packing, accumulation, evaluation: everything that a resumed run must get right; (model, result)."""
    model = tiny_model({"lora": {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"}})
    config = tiny_config(
        output_dir, gradient_accumulation_steps=2, packing=True, max_length=24, eval_steps=2, warmup_steps=2,
        lr_scheduler_type="cosine", weight_decay=0.1, load_best_model_at_end=True, logging_steps=2,
    )  # fmt: skip
    return model, train(model, tiny_examples(), config, tiny_examples(6, seed=1), progress)


if __name__ == "__main__":
    torch.set_num_threads(1)

    def die(step, *_):
        if step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    noisy_run(Path(sys.argv[1]), die)
