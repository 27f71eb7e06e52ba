"""`burnish quantize`: store a model's weights in fewer bits."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from burnish import chain
from burnish.chain import Context, Model
from burnish.compress import mixed_bits
from burnish.compress.grouped import BITS, Grouped
from burnish.config import Bytes, UserError, coerce, to_mapping
from burnish.engine.proof import Made, ProofOptions, proven
from burnish.model.linear import Dense, Weight
from burnish.model.surgery import select
from burnish.plan import shadow
from burnish.store import gptq_layout
from burnish.store.checkpoint import contents, load, save
from burnish.store.data import encode_rows, read_rows
from burnish.store.gguf_model import stored_as

LONGEST = 1 << 20  # tokens of a row of calibration text, which is joined and cut anyway
MIXED = ("int_groups", "gptq")


@dataclass(frozen=True)
class QuantizeConfig(ProofOptions):
    """One model, one method or a chain of them."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    method: Literal["int8", "nf4", "fp4", "fp8", "int_groups", "gptq"] | None = field(
        default=None, metadata={"help": "how the weights are stored; none: nf4"}
    )
    techniques: list[Any] = field(
        default_factory=list, metadata={"help": "instead of a method, as in '[awq, {gptq: {bits: 3}}]'"}
    )
    target_size: str = field(
        default="",
        metadata={
            "help": "most bytes of the result's weights, embeddings too, as 300MB, or as 40% of the model's: a scan "
            "chooses each projection's bits (int_groups, gptq)"
        },
    )
    data: str = field(default="", metadata={"help": "text to calibrate on; none: a built-in sample"})
    output_dir: Path | None = field(default=None, metadata={"help": "folder of the quantised model"})


def run(config: QuantizeConfig) -> int:
    """Quantise and save; prints each projection's error, the bits that were chosen, what calibrated, the bytes before
    and after, and the proof. Raises UserError for a model that is quantised already."""
    if config.output_dir is None:
        raise UserError("output_dir: say where the result goes, as in --output-dir runs/small")
    if config.techniques and config.method:
        raise UserError("method: stands instead of techniques; leave one of the two away")
    techniques = config.techniques or [config.method or "nf4"]
    links = dict(chain.parse_chain(techniques))
    check_order(list(links))
    name = next((name for name in MIXED if name in links), "")
    if config.target_size and not name:
        raise UserError("target_size: bits are chosen for int_groups and gptq; say --method gptq")
    if config.target_size and (links[name].bits_pattern or links[name].bits != type(links[name])().bits):
        raise UserError(f"target_size: chooses {name}'s bits itself; leave bits and bits_pattern away")
    calibrates = config.target_size or any(getattr(chain.technique(name), "CALIBRATES", False) for name in links)
    if config.data and not calibrates:
        raise UserError(f"data: none of {', '.join(links)} calibrates; leave it away")

    def source() -> Model:
        model = load(config.model, techniques=techniques)
        check(model, config.model, links)
        return model

    def write(model: Model, place: Path) -> Made:
        before = size(model)
        errors: dict[str, float | None] = {}
        made = Made(calibrations(config, links))
        scaled: dict[str, dict[str, tuple[float, float]]] = {}
        report = printer(config.json, len(takers(model, links)), errors, scaled)
        context = Context(examples=examples(model, config.data), report=report, errors=True)
        if config.target_size:
            links[name] = mixed(model, config, links, name, context)
            bits = {path: links[name].form(path).bits for path in links[name].target_modules}
            made.figures["bits"] = bits
            counts = ", ".join(f"{count} of {b} bits" for b, count in sorted(Counter(bits.values()).items()))
            made.lines += [f"chosen for {config.target_size}: {counts}", *mixed_bits.table(bits)]
        chain.apply(model, [{name: to_mapping(link)} for name, link in links.items()], context)
        save(model, place)
        after = size(model)
        made.lines.append(f"{before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB ({after / before:.0%})")
        made.figures |= {"before": before, "after": after, "errors": errors, **({"scaled": scaled} if scaled else {})}
        return made

    return proven(source, write, config.output_dir, config)


def check_order(names: list[str]) -> None:
    """Raise UserError where no technique quantises, or one that scales weights comes behind one that stores them."""
    storing = [name for name in names if getattr(chain.technique(name), "STORES_ANEW", False)]
    scaling = [name for name in names if getattr(chain.technique(name), "TAKES_UNREAD", False)]
    if not storing + scaling:
        raise UserError(f"techniques: none of {', '.join(names)} quantises; see burnish tune for what is trained")
    for name in scaling:
        if storing and names.index(name) > names.index(storing[0]):
            raise UserError(f"techniques: {name} scales weights that {storing[0]} has rounded; put {name} before it")


def check(model: Model, name: str, links: dict[str, Any]) -> None:
    """Raise UserError where a matrix of the model is quantised already, or as `takers` does."""
    for path, part in model.net.named_modules():
        if isinstance(part, Weight) and not isinstance(part, Dense):
            where = re.sub(r"(\.base)*\.(weight|storage)$", "", path)
            kind = stored_as(part) or ("int_groups" if isinstance(part, Grouped) else type(part).__name__)
            raise UserError(f"{name}: {where} is quantised already ({kind}); start from the 16-bit model")
    takers(model, links)


def takers(model: Model, links: dict[str, Any]) -> dict[str, str]:
    """The paths of the projections that `links` quantise, each with the link's name. Raises UserError where two would
    quantise the same."""
    taken: dict[str, str] = {}
    for link, options in links.items():
        if getattr(chain.technique(link), "STORES_ANEW", False):
            for path, _ in select(model.net, options.target_modules):
                if taken.setdefault(path, link) != link:
                    raise UserError(
                        f"techniques: {taken[path]} and {link} would both quantise {path}; give each target_modules of "
                        "its own"
                    )
    return taken


def calibrations(config: QuantizeConfig, links: dict[str, Any]) -> list[str]:
    """What text is read for what, a line each."""
    text = config.data or "the built-in sample"
    wanted = {"the choice of bits": (mixed_bits.ROWS, mixed_bits.LENGTH)} if config.target_size else {}
    for link, options in links.items():
        if getattr(chain.technique(link), "CALIBRATES", False):
            wanted[link] = options.nsamples, options.max_length
    return [
        f"calibration of {what}: {text}, at most {n} rows of {length} tokens" for what, (n, length) in wanted.items()
    ]


def mixed(model: Model, config: QuantizeConfig, links: dict[str, Any], name: str, context: Context) -> Any:
    """The config of the technique `name` in `links` with the bits of each projection for the target size.

    Raises UserError for a size below what all projections in the fewest bits take.
    """
    if model.chain:
        raise UserError(f"target_size: {config.model} is tuned or quantised already; take the plain checkpoint")
    targets = select(model.net, links[name].target_modules)
    plain = replace(links[name], target_modules=[path for path, _ in targets], bits_pattern={})

    def made(found: Any) -> Model:
        """Without storage, with the chain in which `found` is the technique's config."""
        return chain.apply(shadow(config.model), [{x: to_mapping(y)} for x, y in {**links, name: found}.items()])

    cost: dict[str, dict[int, int]] = {}
    forms = {bits: replace(plain, bits=bits).form("") for bits in BITS}
    smallest = made(replace(plain, bits=min(BITS)))
    nbytes = gptq_layout.nbytes if gptq_layout.fits(smallest.net) else lambda weight: weight.nbytes
    with torch.device("meta"):
        for path, linear in targets:
            shape = linear.out_features, linear.in_features
            cost[path] = {bits: nbytes(Grouped.empty(form, *shape)) for bits, form in forms.items()}
    total, wanted, least = size(model), 0, contents(smallest).nbytes
    if config.target_size.endswith("%"):
        wanted = int(coerce(config.target_size[:-1], float, "target_size") / 100 * total)
    else:
        wanted = coerce(config.target_size, Bytes, "target_size")
    if wanted < least:
        raise UserError(
            f"target_size: {config.target_size} is below what all projections in {min(BITS)} bits take; the smallest "
            f"size is {math.ceil(least / 1e3)}KB ({math.ceil(1000 * least / total) / 10}%)"
        )
    damage = mixed_bits.damages(model, targets, forms, context)
    budget = wanted - least + sum(own[min(BITS)] for own in cost.values())
    while True:
        chosen = mixed_bits.choose(damage, cost, budget)
        common = Counter(chosen.values()).most_common(1)[0][0]
        others = {path: bits for path, bits in chosen.items() if bits != common}
        found = replace(plain, bits=common, bits_pattern=others)
        over = contents(made(found)).nbytes - wanted
        if over <= 0:
            return found
        budget = sum(cost[path][bits] for path, bits in chosen.items()) - over  # a file's header grows with its numbers


def size(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.net.parameters())


def examples(model: Model, data: str) -> list[Any]:
    """The rows of a file or data set, every token of theirs."""
    return encode_rows(read_rows(data), model.tokenizer, LONGEST, "all", data) if data else []


def printer(
    as_json: bool,
    total: int,
    errors: dict[str, float | None],
    scaled: dict[str, dict[str, tuple[float, float]]],
) -> Any:
    """What prints a record of the scan, of a projection that is scaled, whose errors before and after go into `scaled`
    by technique and path, or of one of `total` that are stored, whose error goes into `errors`: JSON, or a line on the
    error stream."""

    def show(record: dict[str, Any]) -> None:
        if "layer" in record:
            errors[record["layer"]] = record["error"]
        if "scaled" in record:
            scaled.setdefault(record["technique"], {})[record["scaled"]] = record["before"], record["error"]
        if as_json:
            print(json.dumps(record), flush=True)
            return
        if "scanned" in record:
            line = f"scan of what each projection's bits cost: {record['scanned']} of {record['of']} tokens"
        elif "scaled" in record:
            line = f"{record['technique']}, layer {record['done']}/{record['of']}  {record['scaled']}  "
            line += f"error {100 * record['before']:.3g}% -> {100 * record['error']:.3g}%"
        else:
            error = record["error"]
            told = "rounded: no token reached it" if error is None else f"error {100 * error:.3g}%"
            line = f"{len(errors)}/{total}  {record['layer']}  {told}"
        print(line, file=sys.stderr, flush=True)

    return show
