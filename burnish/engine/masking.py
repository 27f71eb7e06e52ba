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

from burnish.model.example import IGNORE, Example
from burnish.store.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
