"""A tokenizer for text to ids and back, which becomes transformers' own when anything more is asked of it.

Importing transformers takes about as long as loading a small model. For encoding and decoding a plain text it adds
nothing to the `tokenizers` library, which reads the same tokenizer.json, as long as tokenizer_config.json only names
special tokens that tokenizer.json has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("extra_special_tokens", "additional_special_tokens")
NEUTRAL = {  # keys that change neither ids nor text
    *("backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only", "model_input_names"),
    *("model_max_length", "tokenizer_class"),
}


def lazy_tokenizer(folder: Path, whole: Callable[[], Any]) -> LazyTokenizer | None:
    """The tokenizer in `folder`; `whole` loads transformers'. None where its files ask for more than this knows."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "special_tokens_map.json").exists() or (folder / "added_tokens.json").exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if not config.keys() <= NEUTRAL | {*MARKS, *LISTS, "added_tokens_decoder"}:
        return None
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    texts = {name: _text(config[name]) for name in MARKS if config.get(name) is not None}
    listed = [_text(token) for name in LISTS for token in config.get(name) or ()]
    written = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    own = backend.get_added_tokens_decoder()
    special = {token.content for token in own.values() if token.special}
    if not special.issuperset([*texts.values(), *listed]):
        return None
    if any(number not in own or not _same(token, own[number]) for number, token in written.items()):
        return None
    return LazyTokenizer(backend, {name: backend.token_to_id(text) for name, text in texts.items()}, whole)


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _same(written: dict[str, Any], own: Any) -> bool:
    return all(getattr(own, name, None) == value for name, value in written.items() if name != "__type")


class Encoded(dict[str, list[int]]):
    """What a call gives, by key or by attribute."""

    def __getattr__(self, name: str) -> list[int]:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class LazyTokenizer:
    """Ids of a text, text of ids, the special ids and the vocabulary; whatever else is read, set or called turns the
    object into the `PreTrainedTokenizerFast` of its folder, in place."""

    is_fast = True

    def __init__(self, backend: Any, marks: dict[str, int | None], whole: Callable[[], Any]):
        ids = {f"{name}_id": marks.get(name) for name in MARKS}
        self.__dict__.update(ids, backend=backend, whole=whole)

    def __getattr__(self, name: str) -> Any:
        self._become()
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._become()
        setattr(self, name, value)

    def _become(self) -> None:
        full = self.__dict__["whole"]()
        object.__setattr__(self, "__class__", type(full))
        object.__setattr__(self, "__dict__", full.__dict__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._become()
        return self.__reduce_ex__(protocol)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __call__(self, text: Any, *args: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        if args or options or not isinstance(text, str):
            self._become()
            return self(text, *args, add_special_tokens=add_special_tokens, **options)
        encoded = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return Encoded(input_ids=encoded.ids, attention_mask=encoded.attention_mask)

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        if options != {"clean_up_tokenization_spaces": False}:  # what is done by default, a config says
            self._become()
            return self.decode(ids, skip_special_tokens, **options)
        numbers = [ids] if isinstance(ids, int) else list(ids)
        return self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(token) for token in ids]

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return self.backend.get_added_tokens_decoder()
