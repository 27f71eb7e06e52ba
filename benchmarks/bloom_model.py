"""Write a BLOOM with random weights in bfloat16, for recipes/bloom-strategies.yaml.

    python benchmarks/bloom_model.py runs/bloom

The shape of BLOOM-560m; --large that of BLOOM-7B1. The tokenizer has a made-up word for every token, so that replies
can be told apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

VOCABULARY = 250880
SHAPES = {
    False: {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    True: {"hidden_size": 4096, "n_layer": 30, "n_head": 32},
}


def main() -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--large", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **SHAPES[given.large])).save_pretrained(given.folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(given.folder)


if __name__ == "__main__":
    main()
