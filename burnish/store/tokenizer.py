"""Tokenizers: loading, saving, training a byte-level BPE, and chat text with its mask of learnt tokens.

`PreTrainedTokenizerFast` reads `tokenizer.json` directly, which is three times as fast to import as
`AutoTokenizer` and takes the file at its word; where text and ids are all that is asked for, even that is not
imported (`lazy_tokenizer`). Folders without that file go through `AutoTokenizer`, never with remote code.

What a chat model learns is each reply and the token that ends it, nothing else. Which characters are a reply
is told by the chat template's `{% generation %}` markers, or, where it has none, by rendering the
conversation turn by turn: what `messages[:i + 1]` adds to `messages[:i]` with its generation prompt is reply
i. The whole conversation is then tokenised once, so that the ids are those of
`tokenizer.apply_chat_template`, and a token is learnt if its last character is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.config import UserError
from burnish.store.lazy_tokenizer import lazy_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")
ENCODER_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% elif message.role in ['system', 'user'] %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message.role) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACEHOLDER = "\ue000reply\ue000"  # private-use characters, which no template or text contains

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")

Message = dict[str, Any]
Span = tuple[int, int]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a Hugging Face folder, with the special tokens and chat template its files name.

    Raises UserError if the folder holds no tokenizer or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, so no tokenizer; name a model folder")
    tokenizer: Any
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = lazy_tokenizer(folder, lambda: _fast(folder)) or _fast(folder)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
            raise UserError(f"{folder}: holds no tokenizer; copy tokenizer.json and its like into it") from None
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from error
    return tokenizer


def _fast(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    written = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    tokenizer.hub_class = written.get("tokenizer_class")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the chat template into `folder`.

    `tokenizer_class` stays the one the tokenizer was loaded with. Without one it is
    `PreTrainedTokenizerFast`, which every release of transformers knows; release 5 on its own would write
    `TokenizersBackend`, which release 4 cannot load.
    """
    tokenizer.save_pretrained(str(folder))
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        hub_class = getattr(tokenizer, "hub_class", None)
        config["tokenizer_class"] = (
            hub_class if hub_class not in (None, "TokenizersBackend") else "PreTrainedTokenizerFast"
        )
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    chat_template: str | None = CHAT_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from `texts`: lossless, each digit its own token, no space added in front of a
    text.

    The first of `special_tokens` pads, the second ends a turn and a document; they get the ids 0, 1, .... The
    vocabulary has at most `vocab_size` entries, 256 of them single bytes. llama.cpp knows this way of
    splitting text as `smollm`.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(texts, vocab_size, special_tokens),
        pad_token=special_tokens[0],
        eos_token=special_tokens[1],
        extra_special_tokens=list(special_tokens[2:]),
        chat_template=chat_template,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def train_encoder_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The same with BERT's special tokens and marks: `[CLS] text [SEP]`, `[CLS] text [SEP] other [SEP]`.

    [MASK] takes the space before it, as the words do that it stands for.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    backend = _byte_level_bpe(texts, vocab_size, tuple(ENCODER_TOKENS.values()))
    mask = AddedToken(ENCODER_TOKENS["mask_token"], lstrip=True, special=True)
    backend.add_special_tokens([mask])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names: dict[str, Any] = {**ENCODER_TOKENS, "mask_token": mask}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 256 + len(special_tokens):
        raise UserError(
            f"vocab_size={vocab_size}: at least {256 + len(special_tokens)} are needed,"
            " for 256 bytes and the special tokens"
        )
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch: the pad token's, else the unknown, else the end token's, else 0.

    Any id does: padding is known by position (attention mask and label -100), never by its id, so that a
    model whose pad token is its end token still learns to end.
    """
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that are marks rather than text."""
    added = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return added | set(tokenizer.all_special_ids)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation rendered by the chat template, and for each whether it is learnt.

    Learnt are the assistant's replies, each with its end-of-turn token; a template that closes the last reply
    with nothing gets the tokenizer's end token there, as the model would otherwise never stop. A reply with
    no message before it may be context only.

    Raises UserError if there is no chat template, if it rejects the conversation, or if it neither marks its
    replies nor renders a conversation's beginning as the beginning of the whole (so that replies cannot be
    told from context).
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template;"
            " add chat_template.jinja to the model's folder, or give prompt and completion"
        )
    marked = MARKER.search(tokenizer.get_chat_template()) is not None
    text, spans = _marked_replies(tokenizer, messages) if marked else _replies_by_prefix(tokenizer, messages)
    ids, mask = _tokenise(tokenizer, text, spans)
    ends_in_reply = messages[-1]["role"] == "assistant" and any(end > start for start, end in spans[-1:])
    _end_turns(tokenizer, ids, mask, ends_in_reply)
    return ids, mask


def _rendered(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except Exception as error:  # a template is a program: it may raise anything
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the chat template rejects this conversation: {reason or type(error).__name__}") from error


def _marked_replies(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    marks: dict[str, Any] = dict(tokenizer.special_tokens_map)
    texts, spans = _rendered(
        lambda: render_jinja_template(
            conversations=[list(messages)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **marks,
        )
    )
    return texts[0], spans[0]


def _replies_by_prefix(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    def render(part: Sequence[Message], prompt: bool = False) -> str:
        return _rendered(
            lambda: tokenizer.apply_chat_template(list(part), tokenize=False, add_generation_prompt=prompt)
        )

    full = render(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before = render(messages[:i], prompt=True)
        end = _reply_end(render, full, messages, i)
        if not full.startswith(before) or end is None or end < len(before):
            raise UserError(
                f"the reply in message {i + 1} cannot be told from its context, as the chat template renders the"
                " conversation before it differently once it is there;"
                " mark its replies with {% generation %} ... {% endgeneration %}"
            )
        spans.append((len(before), end))
    return full, spans


def _reply_end(
    render: Callable[[Sequence[Message]], str], full: str, messages: Sequence[Message], i: int
) -> int | None:
    """Where reply i ends in the full text, or None if the template does not tell.

    Some templates (Qwen3's, Phi-4's) treat the last reply unlike earlier ones, so that `messages[:i + 1]` is no prefix
    of the whole. There a placeholder is put in the reply's stead: what follows it must end the whole, and what follows
    it with and without later messages begins with the end of the turn.
    """
    if i == len(messages) - 1:
        return len(full)
    upto = render(messages[: i + 1])
    if full.startswith(upto):
        return len(upto)
    swapped = [*messages[:i], {**messages[i], "content": PLACEHOLDER}]
    _, found, after = render([*swapped, *messages[i + 1 :]]).rpartition(PLACEHOLDER)
    if not found or not full.endswith(after):
        return None
    _, _, closing = render(swapped).rpartition(PLACEHOLDER)
    return len(full) - len(after) + len(commonprefix([closing, after]))


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    learnt = bytearray(len(text) + 1)  # per character
    for start, end in spans:
        learnt[start:end] = b"\1" * (end - start)
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [learnt[max(a, b - 1)] == 1 for a, b in encoded["offset_mapping"]]
    ids: list[int] = []
    mask: list[bool] = []
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    for i in range(len(cuts) - 1):
        part = tokenizer(text[cuts[i] : cuts[i + 1]], add_special_tokens=False)["input_ids"]
        ids += part
        mask += [i % 2 == 1] * len(part)
    return ids, mask


def runs(mask: Sequence[bool]) -> list[Span]:
    """(start, end) of each run of true values."""
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _end_turns(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool], ends_in_reply: bool) -> None:
    """Makes each learnt run end with its end-of-turn token if there is one; changes its arguments."""
    special, eos = special_ids(tokenizer), tokenizer.eos_token_id
    replies = runs(mask)
    closing = {eos}
    for number, (start, end) in reversed(list(enumerate(replies))):
        last = end - 1
        while last > start and ids[last] not in special and str(tokenizer.decode([ids[last]])).isspace():
            last -= 1
        if ids[last] in special:  # a line break after the end of the turn belongs to the next turn
            mask[last + 1 : end] = [False] * (end - last - 1)
            closing.add(ids[last])
        elif end < len(ids) and ids[end] in closing:
            mask[end] = True
        elif end < len(ids) and ends_in_reply and number == len(replies) - 1:
            if ids[end] in special:
                mask[end] = True
                closing.add(ids[end])
            else:  # a closing spelt out in ordinary tokens
                mask[end:] = [True] * (len(ids) - end)
    if ends_in_reply and mask and mask[-1] and ids[-1] not in special and eos is not None:
        ids.append(eos)
        mask.append(True)
