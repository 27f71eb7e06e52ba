"""Which tokens a masked language model is to tell, and what stands in their place.

Of the learnt tokens of a row 15% are chosen; of these 80% become [MASK], 10% any token, 10% stay as they are, so that a
token's own state is of use without a mask too (BERT, arXiv 1810.04805, section 3.1). They are chosen anew in every
epoch (RoBERTa, arXiv 1907.11692, section 4.1).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from burnish.model.bundle import Model
from burnish.model.example import IGNORE, Example
from burnish.store.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE = 0.15
MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the others stay


def masked(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, share: float, seed: int, epoch: int
) -> list[Example]:
    """The examples with `share` of their labelled tokens chosen, at least one where there is any; only these keep
    their labels. Special tokens are never chosen. The choice is a function of (seed, epoch, index) alone."""
    special = special_ids(tokenizer)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    found = []
    for index, example in enumerate(examples):
        rng = random.Random(f"{seed}/{epoch}/{index}")
        ids, labels = list(example.ids), [IGNORE] * len(example.ids)
        places = [at for at, label in enumerate(example.labels) if label != IGNORE and label not in special]
        for at in rng.sample(places, min(len(places), max(1, round(share * len(places))))):
            labels[at] = example.labels[at]
            draw = rng.random()
            if draw < MASKED:
                ids[at] = tokenizer.mask_token_id
            elif draw < MASKED + REPLACED:
                ids[at] = rng.choice(ordinary)
        found.append(replace(example, ids=ids, labels=labels))
    return found


def tells_words(model: Model) -> bool:
    """Whether it is a masked language model, with a tokenizer that has a mask."""
    return model.spec.head == "masked_lm" and getattr(model.tokenizer, "mask_token_id", None) is not None


def clozes(model: Model, examples: Sequence[Example]) -> Sequence[Example]:
    """Encoded examples as a masked language model is asked them, other models' as they are: behind a prompt a [MASK]
    stands for every token that is to be told, and a separator ends the row. What is masked already stays as it is."""
    if not tells_words(model):
        return examples
    return [cloze(example, model.tokenizer) if example.prompt_length else example for example in examples]


def cloze(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A row with its labelled tokens masked."""
    mask, end = tokenizer.mask_token_id, tokenizer.sep_token_id
    pairs = list(zip(example.ids, example.labels, strict=True))
    if all(token == mask for token, label in pairs if label != IGNORE):
        return example
    ends = [] if end is None or end in example.ids else [end]
    return replace(
        example,
        ids=[token if label == IGNORE else mask for token, label in pairs] + ends,
        labels=example.labels + [IGNORE] * len(ends),
        slots=example.slots and example.slots + [-1] * len(ends),
        token_types=example.token_types and example.token_types + example.token_types[-1:] * len(ends),
        choices=example.choices and [cloze(choice, tokenizer) for choice in example.choices],
    )


def held_out(model: Model, examples: Sequence[Example]) -> Sequence[Example]:
    """Encoded examples to measure a masked language model on, other models' as they are: `clozes`, and of rows
    without a prompt `SHARE`, always the same tokens."""
    if not tells_words(model):
        return examples
    chosen = masked(examples, model.tokenizer, SHARE, seed=0, epoch=-1)
    asked = zip(examples, clozes(model, examples), chosen, strict=True)
    return [each if example.prompt_length else some for example, each, some in asked]
