"""Tokenizers in GGUF's metadata: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

llama.cpp splits text by rules of its own, chosen by name (`tokenizer.ggml.pre`); a tokenizer is written only under the
name of the rule that splits as it does. SentencePiece's merges go by their tokens' scores, so that merges and scores
each follow from the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from burnish.config import UserError
from burnish.store.gguf import File, Texts
from burnish.store.lazy_tokenizer import LazyTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
MARKS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
ENDS = ("eos", "eot", "eom")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BYTES = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE: dict[str, list[dict[str, Any]]] = {  # llama.cpp's rules as pre-tokenizers of the tokenizers library
    "gpt-2": [BYTES],
    "smollm": [DIGITS, BYTES],
    "llama-bpe": [_split(ENDINGS + WORDS % "{1,3}"), PLAIN_BYTES],
    "qwen2": [_split(ENDINGS + WORDS % ""), PLAIN_BYTES],
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        BYTES,
        {"type": "Digits", "individual_digits": False},
        _split("[0-9][0-9][0-9]"),
    ],
    "bloom": [_split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), PLAIN_BYTES],
}
ALIASES = {  # other names of the same rules
    **dict.fromkeys(("mpt", "olmo", "jais", "phi-2", "jina-es", "jina-de", "gigachat"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "dbrx"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), "qwen2"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is not merged
META = "▁"
LONGEST = 512  # characters of a token that merges may give; what is longer no text has
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
LEARNT = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")  # only burnish and transformers know this block


def written(tokenizer: Any, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer for an embedding of `rows` rows. Raises UserError where llama.cpp has no such one."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    steps = _steps(data["pre_tokenizer"])
    tokens = {number: token for token, number in model["vocab"].items()} if model["type"] == "BPE" else {}
    types = dict.fromkeys(tokens, NORMAL)
    tokens |= {number: token["content"] for number, token in added.items()}
    types |= {number: CONTROL if token["special"] else USER_DEFINED for number, token in added.items()}
    listed = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = [types.get(number, UNUSED) for number in range(rows)]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges", [])]
    keys: dict[str, Any] = {"tokens": listed}
    if model["type"] == "BPE" and model.get("byte_fallback"):
        ranks = {pair.replace(" ", ""): float(-rank) for rank, pair in reversed(list(enumerate(merges, 1)))}
        keys["scores"] = [ranks.get(token, 0.0) for token in listed]
        unknown = model["vocab"].get(model.get("unk_token"))
        kinds = [
            BYTE if _is_byte(token) and kind == NORMAL else kind for token, kind in zip(listed, kinds, strict=True)
        ]
        if unknown is not None:
            kinds[unknown], keys["unknown_token_id"] = UNKNOWN, unknown
        keys |= {"model": "llama", "add_space_prefix": _prefixes_space(data)}
    elif model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        pre = next((name for name, rule in PRE.items() if [_whole(step) for step in steps] == rule), None)
        normal = (data["normalizer"] or {}).get("type")
        if pre is None or normal not in (None, "NFC"):
            what = json.dumps(data["normalizer"] if pre else steps, ensure_ascii=False)
            raise UserError(f"gguf: llama.cpp splits no text as this tokenizer does: {what[:300]}")
        keys |= {"model": "gpt2", "pre": pre, "merges": merges}
    else:
        raise UserError(f"gguf: a {model['type']} tokenizer; llama.cpp's are byte-level BPE and SentencePiece's BPE")
    keys["token_type"] = kinds
    marks = {f"{name}_token_id": getattr(tokenizer, f"{mark}_id") for name, mark in MARKS.items()}
    keys |= {name: number for name, number in marks.items() if number is not None}
    bare, around = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    keys["add_bos_token"] = around[: len(around) - len(bare)][:1] == [tokenizer.bos_token_id] and around != bare
    keys["add_eos_token"] = len(around) > len(bare) and around[-1] == tokenizer.eos_token_id != bare[-1]
    found = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    template = tokenizer.chat_template
    if isinstance(template, str):
        found["tokenizer.chat_template"] = LEARNT.sub(
            lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", template
        )
    return found


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]


def _whole(step: dict[str, Any]) -> dict[str, Any]:
    """A step with what older files leave away, and without what changes no token."""
    step = {**BYTES, **step, "trim_offsets": True} if step["type"] == "ByteLevel" else step
    regex = step.get("pattern", {}).get("Regex", "")
    longhand = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"
    return _split(regex.replace(longhand, ENDINGS)) if step["type"] == "Split" and not step["invert"] else step


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _prefixes_space(data: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    text = json.dumps(data["normalizer"]) + json.dumps(data["pre_tokenizer"])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def rebuilt(file: File) -> LazyTokenizer:
    """The tokenizer of a file. Raises UserError for one that is not supported, or not whole."""
    from tokenizers import Tokenizer

    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"tokenizer.ggml.{key}", default)

    def broken(why: str) -> UserError:
        return UserError(f"{file.path}: its tokenizer cannot be read: {why}")

    tokens, kinds = get("tokens"), get("token_type")
    if not isinstance(tokens, Texts) or not (kinds is None or isinstance(kinds, np.ndarray)):
        raise broken("tokenizer.ggml.tokens is no list of texts, or token_type no list of numbers")
    texts = list(tokens)
    types = [NORMAL] * len(texts) if kinds is None else kinds.tolist()
    numbers = {name: get(f"{name}_token_id") for name in (*MARKS, *ENDS)}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    if len(types) != len(texts) or any(not isinstance(x, int) or not 0 <= x < len(texts) for x in numbers.values()):
        raise broken(f"{len(types)} types of tokens for {len(texts)} tokens, or a special token beyond them")
    kind, pre = get("model"), get("pre", "default")
    pre = ALIASES.get(pre, pre) if isinstance(pre, str) else "?"
    if kind == "gpt2" and pre in PRE and isinstance(get("merges"), Texts):
        data = _byte_level(texts, types, list(get("merges")), pre)
    elif kind == "llama" and isinstance(get("scores"), np.ndarray) and len(get("scores")) == len(texts):
        data = _sentencepiece(texts, types, get("scores").tolist(), bool(get("add_space_prefix", True)))
    else:
        raise broken(
            f"model {kind!r} with splitting rule {pre!r} is not supported; supported: llama, gpt2 with {list(PRE)}"
        )
    special = (CONTROL, UNKNOWN)
    data["added_tokens"] = [
        {"id": number, "content": text, "special": types[number] in special, **dict.fromkeys(FLAGS, False)}
        for number, text in enumerate(texts)
        if types[number] in (*special, USER_DEFINED)
    ]
    data["post_processor"] = _around(texts, numbers, get)
    whole = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, **data}
    try:
        backend = Tokenizer.from_str(json.dumps(whole))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise broken(str(error).strip().split("\n")[0]) from None
    marks = {mark: numbers[name] for name, mark in MARKS.items() if name in numbers}
    template = file.metadata.get("tokenizer.chat_template")

    def full() -> Any:
        from transformers import PreTrainedTokenizerFast

        named: dict[str, Any] = {mark: texts[number] for mark, number in marks.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **named
        )

    return LazyTokenizer(backend, dict(marks), full)


def _byte_level(texts: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> dict[str, Any]:
    vocab = {text: number for number, text in enumerate(texts) if types[number] != UNUSED}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre in WHOLE_WORDS}
    return {
        "model": model,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE[pre]},
        "decoder": BYTES,
    }


def _sentencepiece(texts: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool) -> dict[str, Any]:
    vocab = {text: number for number, text in enumerate(texts) if types[number] != UNUSED}
    merged = sorted((number for number, kind in enumerate(types) if kind == NORMAL), key=lambda x: -scores[x])
    merges = [
        [texts[number][:cut], texts[number][cut:]]
        for number in merged
        for cut in range(1, len(texts[number]) if len(texts[number]) <= LONGEST else 0)
        if texts[number][:cut] in vocab and texts[number][cut:] in vocab
    ]
    unknown = next((text for text, kind in zip(texts, types, strict=True) if kind == UNKNOWN), None)
    model = {"type": "BPE", "unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": META}
    start = [{"type": "Prepend", "prepend": META}] if prefix else []
    back = [
        {"type": "Replace", "pattern": {"String": META}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    return {
        "model": {**model, "vocab": vocab, "merges": merges},
        "normalizer": {"type": "Sequence", "normalizers": [*start, space]},
        "decoder": {"type": "Sequence", "decoders": back},
    }


def _around(texts: Sequence[str], numbers: dict[str, int], get: Any) -> dict[str, Any] | None:
    """What is put around a text: its begin, its end."""
    sentencepiece = get("model") == "llama" or get("pre") in ("llama-bpe", "llama3", "llama-v3")
    before = ["bos"] if "bos" in numbers and get("add_bos_token", sentencepiece) else []
    after = ["eos"] if "eos" in numbers and get("add_eos_token", False) else []
    if not before + after:
        return None

    def token(name: str, part: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": texts[numbers[name]], "type_id": part}}

    def row(part: int, letter: str) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": letter, "type_id": part}}
        return [*(token(name, part) for name in before), text, *(token(name, part) for name in after)]

    used = {texts[numbers[name]]: numbers[name] for name in before + after}
    special = {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in used.items()}
    pair = row(0, "A") + row(1, "B")
    return {"type": "TemplateProcessing", "single": row(0, "A"), "pair": pair, "special_tokens": special}


def ends(file: File) -> list[int]:
    """The ids that end a reply."""
    found = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS)
    return sorted({number for number in found if isinstance(number, int)})
