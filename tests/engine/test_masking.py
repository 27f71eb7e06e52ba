"""BERT's objective: which tokens are chosen, what stands in their place, and that a resumed run sees the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from tiny_runs import tiny_config, tiny_model

from burnish import chain
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.loss import loss_sum
from burnish.engine.masking import masked
from burnish.engine.order import Order
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import IGNORE, Example
from burnish.store.checkpoint import load
from burnish.store.data import encode_rows
from burnish.store.tokenizer import special_ids, train_encoder_tokenizer

TOKENIZER = tiny.tokenizer("encoder")
CLS, SEP, MASK = 3, 4, 5
TEXT = ["the", "cat", "sees", "a", "red", "bird", "where", "the", "dog", "sleeps"]


def documents(count, length=40):
    ids = [[CLS, *(6 + (i + j) % 40 for j in range(length)), SEP] for i in range(count)]
    return [Example(row, list(row)) for row in ids]


def test_a_seventh_of_the_tokens_is_chosen_and_four_fifths_of_them_masked():
    examples = documents(2000)
    chosen, became = 0, Counter()
    for before, after in zip(examples, masked(examples, TOKENIZER, 0.15, 0, 0), strict=True):
        for old, new, label in zip(before.ids, after.ids, after.labels, strict=True):
            if label == IGNORE:
                assert new == old
                continue
            assert label == old and old not in (CLS, SEP)
            chosen += 1
            became["mask" if new == MASK else "kept" if new == old else "other"] += 1
            assert new == MASK or new not in special_ids(TOKENIZER)
    assert chosen == 2000 * 6  # 15% of 40, exactly
    ordinary = len(TOKENIZER) - len(special_ids(TOKENIZER))  # one of them is the token itself
    assert became["mask"] / chosen == pytest.approx(0.8, abs=0.015)
    assert became["other"] / chosen == pytest.approx(0.1 * (1 - 1 / ordinary), abs=0.01)
    assert became["kept"] / chosen == pytest.approx(0.1 * (1 + 1 / ordinary), abs=0.01)


def test_only_labelled_tokens_are_chosen_and_at_least_one():
    row = Example([CLS, 10, 11, 12, 13, SEP], [IGNORE, IGNORE, IGNORE, 12, IGNORE, SEP])
    for epoch in range(20):
        (found,) = masked([row], TOKENIZER, 0.15, 0, epoch)
        assert found.labels == [IGNORE, IGNORE, IGNORE, 12, IGNORE, IGNORE]
    (none,) = masked([Example([CLS, SEP], [CLS, SEP])], TOKENIZER, 0.15, 0, 0)
    assert none.ids == [CLS, SEP] and set(none.labels) == {IGNORE}


def test_the_choice_is_a_function_of_seed_epoch_and_index():
    examples = documents(8)
    first = masked(examples, TOKENIZER, 0.15, 0, 0)
    assert masked(examples, TOKENIZER, 0.15, 0, 0) == first
    assert masked(examples[:3], TOKENIZER, 0.15, 0, 0) == first[:3]
    assert masked(examples, TOKENIZER, 0.15, 0, 1) != first
    assert masked(examples, TOKENIZER, 0.15, 1, 0) != first
    same = masked([examples[0]] * 20, TOKENIZER, 0.15, 0, 0)
    assert len({tuple(example.labels) for example in same}) > 10


def encoder(root):
    model = load(tiny.folder(root, "bert"))
    return chain.apply(model, ["full"])


def rows():
    return encode_rows([{"text": " ".join(TEXT[i % 3 :])} for i in range(12)], TOKENIZER, 32)


def test_a_text_keeps_its_marks():
    assert all(example.ids[0] == CLS and example.ids[-1] == SEP for example in rows())


def test_the_loss_is_transformers_own(root):
    from transformers import BertForMaskedLM

    model = encoder(root)
    config = TrainConfig(mlm_probability=0.3, per_device_train_batch_size=12)
    order = Order(model, rows(), config)
    batch = order.batch(order.epoch(0)[0][0])
    total, count = loss_sum(model, batch)
    theirs = BertForMaskedLM.from_pretrained(tiny.folder(root, "bert"))(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long(), labels=batch["labels"]
    )
    assert 12 < count < 60 and (batch["input_ids"] == MASK).sum() > 5
    assert (total / count).item() == pytest.approx(theirs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_masks_the_same(root, tmp_path, packing):
    options = dict(mlm_probability=0.15, packing=packing, max_length=32, max_steps=10, eval_steps=5, save_steps=4)

    def run(progress=None, output_dir=None):
        model = encoder(root)
        config = tiny_config(output_dir, **options)
        return model, train(model, rows(), config, rows()[:3], progress)

    def stop(step, *_):
        if step == 7:
            raise KeyboardInterrupt

    whole, expected = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop, tmp_path)
    resumed, result = run(output_dir=tmp_path)
    assert result.losses == expected.losses and result.eval_losses == expected.eval_losses
    for name, parameter in whole.trainable().items():
        assert torch.equal(parameter, resumed.trainable()[name]), name


def test_masking_is_for_masked_language_models(root):
    with pytest.raises(UserError, match="mlm_probability: only a masked language model"):
        train(tiny_model(), documents(2), tiny_config(mlm_probability=0.15))
    with pytest.raises(UserError, match="mlm_probability: a share between 0 and 1"):
        train(encoder(root), rows(), tiny_config(mlm_probability=1.5))


def test_the_mask_takes_the_space_before_it():
    tokenizer = train_encoder_tokenizer(["the cat sees the dog"] * 5, 300)
    ids = tokenizer("the cat [MASK] the dog")["input_ids"]
    marks = [tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id]
    assert marks == [1, 3, 2] and tokenizer.pad_token_id == 0
    without = [token for token in ids if token not in marks]
    assert without == tokenizer("the cat the dog", add_special_tokens=False)["input_ids"]
    assert tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"] == [0, 0, 0, 1, 1]


MODEL = {
    **{"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 600, "hidden_size": 16},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 300},
}


def pretrain(folder, *words, **changes):
    model = json.dumps({**MODEL, "type_vocab_size": 2, **changes})
    fixed = ["--documents", "40", "--max-steps", "2", "--model", model, "--output-dir", str(folder)]
    return main(["pretrain", *fixed, *words])


def test_pretrain_makes_an_encoder_that_transformers_reads(tmp_path):
    from transformers import AutoTokenizer, BertForMaskedLM

    assert pretrain(tmp_path / "out") == 0
    model = load(tmp_path / "out", torch.float32)
    text = "Maren Tolvik was born in [MASK]."
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == model.tokenizer(text)["input_ids"] and ids[0, -3] == theirs.mask_token_id
    other = BertForMaskedLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model.net.eval()
    with torch.no_grad():
        assert torch.allclose(model.net.logits(model.net(ids)), other(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["--parts", "facts,poems"], {}, "parts: the corpus has no part 'poems'"),
        ([], {"architectures": ["BertModel"]}, "pretrained with a masked language model's head"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, changes, message):
    assert pretrain(tmp_path / "out", *words, **changes) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sentences_end_in_a_full_stop():
    from burnish.engine.procedures.pretrain import FULL_STOP

    text = "Rome lies in Italy. Question: Where is Oslo? Answer: Norway. It costs 1.50."
    parts = ["Rome lies in Italy.", "Question: Where is Oslo? Answer: Norway.", "It costs 1.50."]
    assert FULL_STOP.split(text) == parts


def test_parts_leave_the_others_out():
    from burnish.engine.procedures.pretrain import PretrainConfig, rows_of
    from burnish.world.corpus import tagged_documents

    config = PretrainConfig(documents=30, parts=["biographies"], seed=3)
    stream = (document for part, document in tagged_documents(3) if part == "biographies")
    assert rows_of(config) == [next(stream) for _ in range(30)]
    everything = rows_of(replace(config, parts=[]))
    assert [next(iter(row)) for row in everything].count("messages") > 0
