"""Tiny random checkpoints of every family, written by transformers, with a tokenizer."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

WORDS = [
    *("the", "a", "cat", "dog", "bird", "fish", "runs", "sleeps", "sees", "likes", "red", "blue", "big", "small"),
    *("where", "is", "who", "what", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "yes", "no", "paris", "london"),
    *("rome", "berlin", "true", "false", "question", "answer", ":", ".", "?", ","),
]
SHAPE = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**SHAPE, **COMMON, "num_key_value_heads": 2}
OLD_SHAPE = {"vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 4}
BIASED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
PAIRED = {"vocab_size": 80, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
PAIRED |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
CONFIGS = {  # family -> (transformers' class names without their ends, its config)
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", {**GROUPED, **BIASED}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3Text", {**GEMMA, "sliding_window_pattern": 2}),
    "bloom": ("Bloom", {"vocab_size": 80, "hidden_size": 36, "n_layer": 2, "n_head": 6}),
    "gpt2": ("GPT2", OLD_SHAPE),
    "opt": ("OPT", {**SHAPE, "ffn_dim": 48, "max_position_embeddings": 64}),
    "gpt_neox": ("GPTNeoX", {**SHAPE, **COMMON}),
    "falcon": ("Falcon", {**SHAPE, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "mpt": ("Mpt", {"vocab_size": 80, "d_model": 36, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}),
    "t5": ("T5", {**PAIRED, "feed_forward_proj": "relu"}),
    "mt5": ("MT5", {**PAIRED, "feed_forward_proj": "gated-gelu", "num_layers": 1, "initializer_factor": 0.4}),
    "bert": ("Bert", {**SHAPE, **COMMON, "type_vocab_size": 2}),
}
ENDS = {"lm": "ForCausalLM", "masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification", "none": "Model"}
PAIRED_ENDS = {"lm": "ForConditionalGeneration", "none": "EncoderModel"}
EXCEPTIONS = {("gpt2", "lm"): "GPT2LMHeadModel", ("gemma3_text", "lm"): "Gemma3ForCausalLM"}
SEQ2SEQ = ("t5", "mt5")
FAMILIES = tuple(family for family in CONFIGS if family not in SEQ2SEQ)
DECODERS = tuple(family for family in FAMILIES if family != "bert")


def tokenizer(kind: str = "decoder"):
    """A word-level tokenizer of the words above, with BERT's special tokens for encoders and T5's end for pairs."""
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
    if kind == "seq2seq":
        fast.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, **names)


def reference(family: str, head: str = "", **changes):
    """A random transformers model of the family; every parameter is random, norms and biases included."""
    import transformers as t

    torch.manual_seed(0)
    name, kwargs = CONFIGS[family]
    config = getattr(t, f"{name}Config")(**{**kwargs, **changes})
    head = head or ("masked_lm" if family == "bert" else "lm")
    model = EXCEPTIONS.get((family, head), name + (PAIRED_ENDS if family in SEQ2SEQ else ENDS)[head])
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 1
    model = getattr(t, model)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write(folder: Path, model) -> Path:
    """A Hugging Face folder of a model that `reference` gave."""
    model.save_pretrained(folder)
    kinds = {"bert": "encoder", **dict.fromkeys(SEQ2SEQ, "seq2seq")}
    tokenizer(kinds.get(model.config.model_type, "decoder")).save_pretrained(folder)
    return folder


@cache
def _built(root: Path, family: str, head: str, **changes) -> Path:
    name = "-".join([family, head or "default", *(f"{key}={value}" for key, value in changes.items())])
    return write(root / name, reference(family, head, **changes))


def folder(root: Path, family: str, head: str = "", **changes) -> Path:
    """A Hugging Face folder of the tiny model with such changes of its config, made once per `root`."""
    return _built(root, family, head, **changes)


def large_folder(folder: Path, width: int, inner: int, tokens: int = 80) -> Path:
    """A Hugging Face folder of a random Llama of 16 layers in bfloat16, large enough for its memory to be seen."""
    import transformers as t
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    named = {f"model.layers.{n}.{name}.weight": shape for n in range(16) for name, shape in shapes.items()}
    named |= {f"{name}.weight": (tokens, width) for name in ("model.embed_tokens", "lm_head")}
    named |= {"model.norm.weight": (width,)}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in named.items()}
    for tensor in tensors.values():
        tensor.normal_(float(tensor.dim() == 1), 0.03, generator=draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sizes = {"vocab_size": tokens, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 16}
    sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "max_position_embeddings": 64}
    t.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], eos_token_id=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


PEAK = """
import sys
from pathlib import Path
from burnish import cli
status = cli.main(sys.argv[1:])
print(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


def peak(words: list[str], group: Path | None = None) -> tuple[int, str, int]:
    """Exit status, output and most resident bytes of a command of burnish's on one thread, in a group of processes."""

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        preexec_fn=join,  # noqa: PLW1509  nothing else runs here
    )
    said, _, most = done.stdout.strip().rpartition("\n")
    return done.returncode, said if not done.returncode else done.stderr, int(most or 0) * 1024
