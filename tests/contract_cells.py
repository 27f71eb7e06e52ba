"""What each technique does in each family and circumstance: the table that `test_contract.py` holds true.

Run as a script it prints docs/capabilities.md: `python tests/contract_cells.py > docs/capabilities.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tiny_foreign import CONTRACT as FOREIGN
from tiny_foreign import ENCODERS as FOREIGN_ENCODERS
from tiny_foreign import PAIRS as FOREIGN_PAIRS

from burnish.model.families import FAMILIES
from burnish.model.linear import Dense, Weight
from burnish.model.network import Network
from burnish.model.surgery import linears

WORKS, REFUSED, NOT_APPLICABLE = "works", "refused", "not applicable"

CELLS = {
    "plain": "on the checkpoint as it is: the outputs at the start are the expected ones, exactly the expected "
    "parameters train and get gradients, and saving and loading, merging and finalizing keep the outputs",
    "after NF4": "the same on a model whose projections were quantised to NF4 first",
    "left-padded": "rows of different length in one batch, padded on either side, give what each row alone gives",
    "packed": "documents packed into one row give what each alone gives, and do not see each other",
    "cached generation": "token by token with a key-value cache gives what one forward over everything gives",
    "resume": "four training steps equal two, a checkpoint, and two more after a restart, to the last bit",
}


@dataclass(frozen=True)
class Row:
    """What the contract expects of one technique.

    `start`: the outputs after `apply` are the base's ("base"), the hidden states are ("hidden"), they are those of
    the base with the stored weights ("weights"), they are the base's where a row has no virtual token ("soft"), or
    they are others ("changed").
    `trains`: names of the trainable parameters. `trained_with`: what trains it in the resume cell, where it has no
    trainable parameter of its own. `technique`: whose options make the row, where it is not the row's name.
    """

    start: Literal["base", "hidden", "weights", "soft", "changed"]
    trains: Callable[[Network], set[str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    trained_with: str = ""
    technique: str = ""


@dataclass(frozen=True)
class Limit:
    """Cells that do not work, and why; a refusal's reason is part of the error's text. None stands for all."""

    status: str
    reason: str
    techniques: set[str] | None = None
    families: set[str] | None = None
    cells: set[str] | None = None

    def covers(self, *where: str) -> bool:
        wanted = (self.techniques, self.families, self.cells)
        return all(names is None or name in names for names, name in zip(wanted, where, strict=True))


SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj")
PLAIN, GATED = ("mlp.up_proj", "mlp.down_proj"), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PROJECTIONS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), SEPARATE + GATED),
    **dict.fromkeys(("bloom", "gpt2", "gpt_neox", "falcon", "mpt"), FUSED + PLAIN),
    **dict.fromkeys(("opt", "bert", "t5"), SEPARATE + PLAIN),
    "mt5": SEPARATE + GATED,
}

GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
BERT += ("intermediate.dense", "output.dense")
PAIR = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "fc1", "fc2")
FOREIGN_PROJECTIONS = {  # transformers' own paths: of a layer, and in it
    "stablelm": ("model.layers", GATED),
    "cohere": ("model.layers", GATED),
    "gptj": (
        "transformer.h",
        ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    ),
    "mamba": ("backbone.layers", ("mixer.in_proj",)),
    "roberta": ("roberta.encoder.layer", BERT),
    "electra": ("electra.encoder.layer", BERT),
    "bart": ("model.encoder.layers", PAIR),
    "m2m_100": ("model.encoder.layers", PAIR),
}


KEYS_VALUES = r"(.*\.)?(k_proj|v_proj|qkv_proj|key|value)"
FEED_FORWARD = r"(.*\.)?(down_proj|fc_out|fc2|(?<!attention\.)output\.dense)"
SCALED = r".*\.(q_proj|v_proj|qkv_proj|query|value|in_proj)"


def nothing(net: Network) -> set[str]:
    return set()


def everything(net: Network) -> set[str]:
    """All parameters but quantised storage."""
    stored = [f"{path}." for path, m in net.named_modules() if isinstance(m, Weight) and not isinstance(m, Dense)]
    return {name for name, _ in net.named_parameters() if not name.startswith(tuple(stored))}


def projection_paths(net: Network) -> list[str]:
    """Every projection of the body."""
    spec = net.spec
    layers, names = FOREIGN_PROJECTIONS.get(spec.family) or ("layers", PROJECTIONS[spec.family])
    paths = [f"{layers}.{i}.{name}" for i in range(spec.num_layers) for name in names]
    if spec.paired:
        decoder, cross = ("decoder.layers", "cross_attn")
        if spec.family in FOREIGN:
            decoder, cross = ("model.decoder.layers", "encoder_attn")
        names += tuple(name.replace("self_attn", cross) for name in names if "self_attn" in name)
        paths += [f"{decoder}.{i}.{name}" for i in range(spec.decoder_layers) for name in names]
    return paths


def low_rank(net: Network) -> set[str]:
    return {f"{path}.lora_{letter}" for path in projection_paths(net) for letter in "AB"}


def low_rank_with_lengths(net: Network) -> set[str]:
    """DoRA's, and the projections' biases."""
    lengths = {f"{path}.lora_magnitude_vector" for path in projection_paths(net)}
    biases = {f"{path}.base.bias" for path in projection_paths(net)}
    return low_rank(net) | lengths | {name for name, _ in net.named_parameters() if name in biases}


def bottlenecks(net: Network) -> set[str]:
    """The adapters of Houlsby et al., and the norms of the body."""
    outputs = re.compile(r".*(o_proj|out_proj|fc_out|fc2|down_proj|output\.dense)")
    found = {
        f"{path}.{leaf}"
        for path in projection_paths(net)
        if outputs.fullmatch(path)
        for leaf in ("down", "down_bias", "up", "up_bias")
    }
    norms = r"(?!head_transform|lm_head|generator).*(norm|ln_\d|ln_f|LayerNorm|layernorm_embedding)\.(weight|bias)"
    return found | {name for name, _ in net.named_parameters() if re.fullmatch(norms, name)}


def scaled(net: Network) -> set[str]:
    """The scales of the projections that `SCALED` names."""
    return {f"{path}.layer.ia3_l.default" for path, _ in linears(net) if re.fullmatch(SCALED, path)}


def vectors(net: Network) -> set[str]:
    """The scales of the keys, the values and the feed-forward's inner activations."""
    paths = [path for path, _ in linears(net)]
    return {f"{path}.ia3_l" for path in paths if re.fullmatch(f"{KEYS_VALUES}|{FEED_FORWARD}", path)}


def new_head(net: Network) -> set[str]:
    if net.spec.family in FOREIGN:
        body = FOREIGN_PROJECTIONS[net.spec.family][0].split(".")[0]
        return {name for name, _ in net.named_parameters() if name.split(".")[0] != body}
    head = {"score.weight.dense"}
    return head if net.spec.causal else head | {"score.bias", "pooler.weight.dense", "pooler.bias"}


def prompt_encoder(net: Network) -> set[str]:
    lstm = {
        f"lstm.{kind}_l{layer}{way}"
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for layer in (0, 1)
        for way in ("", "_reverse")
    }
    mlp = {f"mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    return {f"techniques.p_tuning.{name}" for name in {"embedding.weight"} | lstm | mlp}


def prefix_encoder(net: Network) -> set[str]:
    mlp = {f"mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    return {f"techniques.prefix_tuning.{name}" for name in {"embedding.weight"} | mlp}


def projected_prefix(net: Network) -> set[str]:
    return {name.replace("prefix_tuning", "p_tuning_v2") for name in prefix_encoder(net)}


BLOCKS = {"block_size": 2, "global_blocks": 1, "window_blocks": 1, "random_blocks": 1}


def new_language_model(net: Network) -> set[str]:
    """What stands on the body, with a matrix of its own."""
    heads = {id(parameter) for module in net.head_modules() for parameter in module.parameters()}
    assert not heads & {id(parameter) for parameter in net.embed_tokens.parameters()}
    return {name for name, parameter in net.named_parameters() if id(parameter) in heads}


ROWS = {
    "full": Row("base", everything),
    "transfer": Row("hidden", new_head),
    "transfer: lm": Row("hidden", new_language_model, {"head": "lm"}, technique="transfer"),
    "adapters": Row("base", bottlenecks, {"size": 4}),
    "lora": Row("base", low_rank, {"r": 4, "target_modules": "all-linear"}),
    "lora: use_dora": Row(
        "base",
        low_rank_with_lengths,
        {"r": 4, "target_modules": "all-linear", "use_dora": True, "bias": "lora_only"},
        technique="lora",
    ),
    "ia3": Row("base", vectors),
    "choice_loss": Row("base", nothing, trained_with="lora"),
    "peft:ia3": Row("base", scaled, {"target_modules": SCALED, "feedforward_modules": []}),
    "prompt_tuning": Row("soft", lambda net: {"techniques.prompt_tuning.embedding"}, {"num_virtual_tokens": 4}),
    "p_tuning": Row("soft", prompt_encoder, {"template": "[P*2] {prompt} [P*2]"}),
    "prefix_tuning": Row("soft", prefix_encoder, {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "p_tuning_v2": Row(
        "soft", projected_prefix, {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16}
    ),
    "int8": Row("weights", nothing, trained_with="lora"),
    "nf4": Row("weights", nothing, trained_with="lora"),
    "fp4": Row("weights", nothing, trained_with="lora"),
    "fp8": Row("weights", nothing, trained_with="lora"),
    "int_groups": Row("weights", nothing, {"group_size": 16}, trained_with="lora"),
    "gptq": Row("weights", nothing, {"group_size": 16, "nsamples": 2, "max_length": 8}, trained_with="lora"),
    "awq": Row("base", nothing, {"group_size": 16, "nsamples": 2, "max_length": 8}, trained_with="lora"),
    "smoothquant": Row("base", nothing, {"nsamples": 2, "max_length": 8}, trained_with="lora"),
    "qat": Row("changed", everything, {"group_size": 16}),
    "magnitude": Row("weights", nothing, trained_with="full"),
    "sparse_attention": Row("changed", nothing, BLOCKS, trained_with="lora"),
}

ENCODERS = {name for name, family in FAMILIES.items() if family.constants["kind"] == "encoder"} | {*FOREIGN_ENCODERS}

SEQ2SEQ = {name for name, family in FAMILIES.items() if family.constants["kind"] == "seq2seq"} | {*FOREIGN_PAIRS}
COUNTING = {*FOREIGN_PAIRS}

LIMITS = (
    Limit(REFUSED, "no pattern reaches it", {"sparse_attention"}, {"gptj", "mamba"}),
    Limit(REFUSED, "keeps no key-value cache to put a prefix into", {"prefix_tuning"}, ENCODERS),
    Limit(
        REFUSED,
        "keeps no key-value cache to put a prefix into",
        {"prefix_tuning", "p_tuning_v2"},
        COUNTING | {"mamba"},
    ),
    Limit(REFUSED, "encoder, run by transformers, takes no prefix", {"p_tuning_v2"}, {*FOREIGN_ENCODERS}),
    Limit(REFUSED, "no attention output projection is known", {"adapters"}, {"mamba"}),
    Limit(REFUSED, "no key projection is known", {"ia3"}, {"mamba"}),
    Limit(REFUSED, "model continues no text", {"choice_loss"}, ENCODERS),
    Limit(REFUSED, "transformers has no classifier of this kind", {"transfer"}, COUNTING | {"cohere", "mamba"}),
    Limit(REFUSED, "encoder gets a classification head only", {"transfer: lm"}, SEQ2SEQ | {*FOREIGN_ENCODERS}),
    Limit(REFUSED, "a chain applies each once", {"nf4"}, cells={"after NF4"}),
    Limit(REFUSED, "is run by transformers, whose norms", {"awq", "smoothquant"}, {*FOREIGN}),
    Limit(REFUSED, "adds what its projections read to its states", {"awq", "smoothquant"}, {"bert"}),
    Limit(REFUSED, "is stored as NF4 already", {"gptq", "awq", "smoothquant", "qat"}, cells={"after NF4"}),
    Limit(REFUSED, "prune before quantising", {"magnitude"}, cells={"after NF4"}),
    Limit(REFUSED, "classified examples cannot be packed, as a row has one class", {"transfer"}, cells={"packed"}),
    Limit(REFUSED, "an encoder-decoder's rows are not packed", families=SEQ2SEQ, cells={"packed"}),
    Limit(REFUSED, "rows whose choices are compared cannot be packed", {"choice_loss"}, cells={"packed"}),
    Limit(REFUSED, "does not keep packed documents apart", families={"mamba"}, cells={"packed"}),
    Limit(REFUSED, "takes no positions, so that rows cannot be padded on the left", None, COUNTING, {"left-padded"}),
    Limit(NOT_APPLICABLE, "an encoder does not generate", families=ENCODERS, cells={"cached generation"}),
    Limit(NOT_APPLICABLE, "a classifier does not generate", {"transfer"}, cells={"cached generation"}),
)


def outcome(technique: str, family: str, cell: str) -> tuple[str, str]:
    """(works, refused or not applicable; the reason)."""
    found = (limit for limit in LIMITS if limit.covers(technique, family, cell))
    return next(((limit.status, limit.reason) for limit in found), (WORKS, ""))


THROUGH = (
    "Any other decoder, encoder or encoder-decoder that transformers loads runs by transformers' own code with "
    "burnish's projections in it; module paths are transformers' own. The models below stand for it, and the same "
    "tests run on them. What differs from a native family:",
    "",
    "- code that a checkpoint brings and models whose body takes no embeddings are refused, and encoder-decoders whose "
    "sides have an embedding each; an encoder-decoder counts positions by itself, so that its rows are padded on the "
    "right and have no prefix, and its encoder alone gets no new head;",
    "- a projection whose weight its layer reads directly (all of Mamba's but `in_proj`) stays as it is, and so do "
    "experts that transformers keeps as one tensor (Mixtral); checkpoints that store them in another layout are read "
    "and written through transformers;",
    "- models for which transformers keeps no cache (OpenAI GPT) train and are measured, and do not generate;",
    "- documents are packed where a trial of eight tokens shows that the model keeps them apart, never with recurrent "
    "states, and with sliding windows where every layer takes its attention from transformers' registry; only there "
    "`sparse_attention` works;",
    "- a prefix does not train with `gradient_checkpointing`; `transfer` needs a classifier of that kind in "
    "transformers.",
)


def page() -> str:
    """docs/capabilities.md."""
    lines = [
        "# What works where",
        "",
        "Every technique on every native model family, and on models that run through transformers. "
        "`tests/test_contract.py` runs each cell of these tables on a small random model of the family; the page is "
        "written from the same table by `python tests/contract_cells.py > docs/capabilities.md`.",
        "",
        *(f"- **{cell}**: {meaning}." for cell, meaning in CELLS.items()),
        "",
        "**yes** is tested. **refused** is an error of one line with the reason; **–** has no meaning there. The "
        "numbers lead to the reasons below. `peft:ia3` stands for the methods of peft that change modules; "
        "`tests/tune/test_peft_method.py` holds more of them against peft itself.",
    ]
    reasons: list[str] = []
    for family in (*FAMILIES, *FOREIGN):
        if family == FOREIGN[0]:
            lines += ["", "# Through transformers", "", *THROUGH]
        lines += ["", f"## {family}", "", f"| technique | {' | '.join(CELLS)} |", "|---" * (len(CELLS) + 1) + "|"]
        for technique in ROWS:
            cells = []
            for cell in CELLS:
                status, reason = outcome(technique, family, cell)
                if reason and reason not in reasons:
                    reasons.append(reason)
                mark = {WORKS: "yes", REFUSED: "refused", NOT_APPLICABLE: "–"}[status]
                cells.append(f"{mark} ({reasons.index(reason) + 1})" if reason else mark)
            lines.append(f"| `{technique}` | {' | '.join(cells)} |")
    lines += ["", "## Reasons", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, start=1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
