"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what bytes that are no character yet decode to
CONTEXT = 6  # prompt tokens before a reply that decide how its first token is spelt


class Detokenizer:
    """Text from tokens, one at a time, up to a stop text; what it has given is never taken back.

    A token's text may depend on the ones before it (a leading space, a character's bytes), so each piece is the
    difference of two decodings that start a few tokens back, and a decoding that ends amid a character waits. Held
    back too is the longest end of the text that a stop text begins with.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.window = list(prompt[-CONTEXT:])
        self.before = self._decode(self.window).rstrip(BROKEN)
        self.known = len(self.window)  # tokens of the window whose text has been given
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; sets `stopped` if a stop text is complete."""
        self.window.append(token)
        text = self._decode(self.window)
        if text == self.before:
            self.window.pop()  # a token without text
        if len(text) <= len(self.before) or text.endswith(BROKEN):
            return ""
        new = text[len(self.before) :]
        self.window = self.window[self.known :]
        self.known, self.before = len(self.window), self._decode(self.window)
        return self._until_stop(new)

    def flush(self) -> str:
        """What was held back, when no token follows; a character that was cut off is left away."""
        rest = self._decode(self.window)[len(self.before) :].rstrip(BROKEN)
        text = self._until_stop(rest) + self.held
        self.held = ""
        return text

    def _decode(self, ids: list[int]) -> str:
        if self.tokenizer is None or not ids:
            return ""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _until_stop(self, new: str) -> str:
        if not self.stop:
            return new
        text = self.held + new
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        longest = min(len(text), max(map(len, self.stop)) - 1)
        hold = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]
