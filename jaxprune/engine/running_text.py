"""Token ids -> text, as they come: the cost of a piece does not grow with the answer."""

import re
from collections.abc import Sequence

from jaxprune.inputs.processor import Processor

_HALF = "\ufffd"  # what a character's first bytes are decoded to
_BYTES = 4  # of a character, at most
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte, where a vocabulary has such


class RunningText:
    """The text of one answer while it grows.

    What may still change is held back: a character's first bytes, a run of tokens that are bytes
    (one that is no character makes the others none either), spaces that may be the last, and
    the beginning of a stop string. So the text is that of all ids decoded at once, however
    many come at a time.

    Args:
        processor: with the tokenizer.
        stop: strings that end the answer; they are not part of it.
    """

    def __init__(self, processor: Processor, stop: Sequence[str]) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        special = {
            text: processor.tokenizer.convert_tokens_to_ids(text)
            for text in stop
            if text in processor.special_tokens
        }
        self._stop = [text for text in stop if text not in special]
        self._stop_ids = frozenset(special.values())
        self._ids: list[int] = []
        self._begin = self._end = 0  # the ids that the newest text was decoded from
        self._shown: list[str] = []
        self._taken = 0
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """What is certain so far."""
        return "".join(self._shown)

    @property
    def tokens(self) -> int:
        """How many ids make up the text, up to the one that completes a stop string."""
        return len(self._ids)

    def take(self) -> str:
        """What has become certain since the last call."""
        new = "".join(self._shown[self._taken :])
        self._taken = len(self._shown)
        return new

    def add(self, ids: Sequence[int], *, last: bool) -> None:
        """More token ids, without the end of sequence; `last`: nothing comes after them."""
        if self.stopped:
            return
        before = len(self._ids)
        self._ids += ids
        ends = [
            place for place in range(before, len(self._ids)) if self._ids[place] in self._stop_ids
        ]
        if ends:  # a special token, which has no text
            del self._ids[ends[0] + 1 :]
            last = True
        self._held += self._decoded(last)
        # Of several stop strings the one that is complete first, however many tokens came.
        found = [(self._held.find(s) + len(s), self._held.find(s), s) for s in self._stop]
        found = [one for one in found if one[1] >= 0]
        self.stopped = bool(ends or found)
        if found:
            _, begin, stop = min(found)
            self._forget_behind(stop)
            self._held = self._held[:begin]
        if last or self.stopped:
            self._show(len(self._held.rstrip()))
        else:
            self._show(min(len(self._held.rstrip()), self._before_stop()))

    def _forget_behind(self, stop: str) -> None:
        """Leave out the ids behind the one that completes a stop string."""
        whole = len(self._ids)
        start = max(self._begin - _BYTES * len(stop), 0)
        for end in range(start, whole):
            if stop in self._decode(start, end):
                del self._ids[end:]
                return

    def _show(self, size: int) -> None:
        """Make so much of what is held certain; an answer begins with its first letter."""
        text = self._held[:size]
        if not self._shown:
            text = text.lstrip()
        if text:
            self._shown.append(text)
        self._held = self._held[size:]

    def _before_stop(self) -> int:
        """The length of what is held up to where a stop string may have begun."""
        held = self._held
        begun = [n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])]
        return len(held) - max(begun, default=0)

    def _decoded(self, last: bool) -> str:
        """Text of the newest ids.

        Tokenizers join and space what they decode by what stands before it, so the ids of the
        text before come along, and their text is taken off again.
        """
        end = len(self._ids) if last else self._certain()
        window, before = self._decode(self._begin, end), self._decode(self._begin, self._end)
        if len(window) > len(before):  # else special tokens alone, which are no context
            self._begin, self._end = self._end, end
        return window[len(before) :]

    def _certain(self) -> int:
        """The number of ids whose text no later one changes."""
        end = len(self._ids)
        while end > self._end and self._is_byte(self._ids[end - 1]):
            end -= 1
        for place in range(end, max(end - _BYTES, self._end), -1):
            if not self._decode(self._begin, place).endswith(_HALF):
                return place
        return self._end

    def _is_byte(self, token_id: int) -> bool:
        return bool(_BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token_id))))

    def _decode(self, begin: int, end: int) -> str:
        return self._processor.text_of(self._ids[begin:end])
