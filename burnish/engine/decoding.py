"""How to continue a prompt: the settings of generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from burnish.config import UserError, option

AT_LEAST = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "top_k": 0,
    "batch_size": 1,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "prompt_lookup_num_tokens": 0,
    "num_assistant_tokens": 1,
}
GUESSES = 8
FAR = 1e12  # so that no logit leaves float32
SHARES = ("top_p", "typical_p")  # above 0, at most 1
SAMPLING = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1}  # and what switches each off
BEAMS = {"length_penalty": 1, "early_stopping": False}  # the same for beam search
LOOPS = {  # what replaces one token a step, and what each is called
    "num_beams": (1, "beam search"),
    "penalty_alpha": (0, "contrastive search"),
    "prompt_lookup_num_tokens": (0, "speculation"),
    "assistant_model": ("", "speculation by another model"),
}


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt, under Hugging Face's names. Raises UserError for a setting that makes no sense."""

    max_new_tokens: int = option(64, "most tokens generated for a prompt")
    min_new_tokens: int = option(0, "tokens before which an end token is not chosen")
    do_sample: bool = option(False, "draw tokens at random; otherwise always the most likely one")
    temperature: float = option(1.0, "when sampling: below 1 sharper, above 1 flatter")
    top_k: int = option(0, "when sampling: only the k most likely tokens; 0: all")
    top_p: float = option(1.0, "when sampling: only the most likely tokens that together reach this probability")
    min_p: float = option(0.0, "when sampling: only tokens at least this share as likely as the likeliest; 0: all")
    typical_p: float = option(1.0, "when sampling: only the most typical tokens that together reach this probability")
    repetition_penalty: float = option(
        1.0, "above 1 makes tokens of the reply, and of a prompt it goes on, less likely"
    )
    presence_penalty: float = option(0.0, "taken from the logit of each token that the reply has")
    frequency_penalty: float = option(0.0, "taken from a token's logit for each time that the reply has it")
    no_repeat_ngram_size: int = option(
        0, "no sequence of so many tokens comes twice, unless nothing else may follow (see choices); 0: any may"
    )
    num_beams: int = option(1, "beam search: so many continuations are followed, and the likeliest is given")
    num_beam_groups: int = option(1, "beam search: groups that keep away from each other's tokens")
    diversity_penalty: float = option(0.0, "beam search: taken for each earlier group that chose the same token")
    length_penalty: float = option(1.0, "beam search: log-probabilities are divided by length to this power")
    early_stopping: bool = option(False, "beam search: stop once as many replies as beams have ended")
    penalty_alpha: float = option(0.0, "contrastive search: weight of being unlike what was said; needs top_k")
    prompt_lookup_num_tokens: int = option(
        0, "speculation: so many tokens are guessed from the text so far and tried at once; the reply is the same"
    )
    assistant_model: str = option(
        "", "speculation: a smaller model of the same tokens (an n-gram model, say), whose likeliest tokens are tried"
    )
    num_assistant_tokens: int = option(GUESSES, "most tokens of the smaller model that are tried at once")
    choices: list[str] = field(
        default_factory=list, metadata={"help": "the reply is one of these texts, a space before it apart"}
    )
    json_schema: dict[str, Any] = field(default_factory=dict, metadata={"help": "the reply is JSON of this schema"})
    stop: list[str] = field(
        default_factory=list, metadata={"help": 'texts that end the reply and are left off, as in ["\\n", "User:"]'}
    )
    stop_token_ids: list[int] = field(default_factory=list, metadata={"help": "tokens that end the reply"})
    seed: int = option(0, "seed of the draws")
    batch_size: int = option(16, "prompts continued at once")
    fused: bool = option(
        True, "decode on the fast path, whole layers in C or CUDA graphs, where device and model allow it"
    )

    def __post_init__(self) -> None:
        for name, least in AT_LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: must be at least {least}, is {getattr(self, name)}")
        if not 1 / FAR <= self.temperature <= FAR:
            raise UserError(
                f"temperature: must be from {1 / FAR:g} to {FAR:g}, is {self.temperature}; for the most likely token"
                " set do_sample: false"
            )
        for name in SHARES:
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}: must be above 0 and at most 1, is {getattr(self, name)}")
        for name in ("min_p", "penalty_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: must be from 0 to 1, is {getattr(self, name)}")
        if not 1 / FAR <= self.repetition_penalty <= FAR:
            raise UserError(
                f"repetition_penalty: must be from {1 / FAR:g} to {FAR:g}, is {self.repetition_penalty}; 1 is none"
            )
        for name in ("presence_penalty", "frequency_penalty", "diversity_penalty"):
            if not abs(getattr(self, name)) <= FAR:
                raise UserError(f"{name}: must be from {-FAR:g} to {FAR:g}, is {getattr(self, name)}")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop: a list of non-empty texts is needed, not {self.stop!r}")
        if isinstance(self.choices, str) or not all(isinstance(text, str) for text in self.choices):
            raise UserError(f"choices: a list of texts is needed, not {self.choices!r}")
        self._check_loops()

    def _check_loops(self) -> None:
        asked = [words for name, (off, words) in LOOPS.items() if getattr(self, name) != off]
        if len(asked) > 1:
            raise UserError(f"{asked[0]} and {asked[1]} do not go together; choose one")
        if self.do_sample and asked and not asked[0].startswith("speculation"):
            raise UserError(f"do_sample: {asked[0]} draws nothing; set it to false")
        if self.num_beams % self.num_beam_groups:
            raise UserError(f"num_beam_groups: {self.num_beams} beams do not make {self.num_beam_groups} equal groups")
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise UserError("diversity_penalty: acts between groups of beams; set num_beam_groups")
        if self.num_beam_groups > 1 and not self.diversity_penalty:
            raise UserError("num_beam_groups: without diversity_penalty all groups choose alike; set it above 0")
        for name, off in BEAMS.items():
            if self.num_beams == 1 and getattr(self, name) != off:
                raise UserError(f"{name}: acts in beam search; set num_beams to 2 or more")
        if self.num_assistant_tokens != GUESSES and not self.assistant_model:
            raise UserError("num_assistant_tokens: acts with an assistant_model; for prompt look-up set its own number")
        if self.penalty_alpha and self.top_k < 2:
            raise UserError("penalty_alpha: contrastive search chooses among top_k tokens; set top_k to 2 or more")
        guided = [name for name in ("choices", "json_schema") if getattr(self, name)]
        if guided and (len(guided) > 1 or self.min_new_tokens):
            raise UserError(f"{guided[0]}: does not go with {guided[-1] if guided[1:] else 'min_new_tokens'}")
        idle = [name for name, off in SAMPLING.items() if getattr(self, name) != off]
        if self.penalty_alpha and "top_k" in idle:
            idle.remove("top_k")
        if idle and not self.do_sample:
            raise UserError(f"{idle[0]}: acts only when tokens are drawn at random; set do_sample: true")
