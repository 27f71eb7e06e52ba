"""Tiny random checkpoints of every family, written by transformers, with a tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

WORDS = [
    *("the", "a", "cat", "dog", "bird", "fish", "runs", "sleeps", "sees", "likes", "red", "blue", "big", "small"),
    *("where", "is", "who", "what", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "yes", "no", "paris", "london"),
    *("rome", "berlin", "true", "false", "question", "answer", ":", ".", "?", ","),
]
SHAPE = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = ("llama", "bloom", "gpt2", "bert")
DECODERS = ("llama", "bloom", "gpt2")


def tokenizer(kind: str = "decoder"):
    """A word-level tokenizer of the words above, with BERT's special tokens for encoders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>"}
    if kind == "encoder":
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        fast.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        names |= {"eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, **names)


def reference(family: str, head: str = "", **changes):
    """A random transformers model of the family; every parameter is random, norms and biases included."""
    import transformers as t

    torch.manual_seed(0)
    heads = {"llama": "lm", "bloom": "lm", "gpt2": "lm", "bert": "masked_lm"}
    head = head or heads[family]
    suffix = {"lm": "ForCausalLM", "masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification"}
    if family == "llama":
        kwargs = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = t.LlamaConfig(**{**kwargs, **changes})
        name = "Llama"
    elif family == "bloom":
        config = t.BloomConfig(**{"vocab_size": 80, "hidden_size": 36, "n_layer": 2, "n_head": 6, **changes})
        name = "Bloom"
    elif family == "gpt2":
        kwargs = {"vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config, name = t.GPT2Config(**{**kwargs, **changes}), "GPT2"
        suffix["lm"] = "LMHeadModel"
    else:
        kwargs = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 64, "type_vocab_size": 2}
        config, name = t.BertConfig(**{**kwargs, **changes}), "Bert"
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 1
    model = getattr(t, name + suffix.get(head, "Model"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def _built(root: Path, family: str, head: str) -> Path:
    folder = root / f"{family}-{head or 'default'}"
    reference(family, head).save_pretrained(folder)
    tokenizer("encoder" if family == "bert" else "decoder").save_pretrained(folder)
    return folder


def folder(root: Path, family: str, head: str = "") -> Path:
    """A Hugging Face folder of the tiny model, made once per `root`."""
    return _built(root, family, head)
