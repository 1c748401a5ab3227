"""Tokens to text while they come: whole characters only, nothing of a stop string, nothing twice."""

REPLACEMENT = "\ufffd"
WHOLE = 4  # tokens that a character may be cut into: UTF-8 has 4 bytes at most
CONTEXT = 8  # tokens of the prompt that are decoded along: some decoders drop the space before the first token


class TextStream:
    """The text of one sequence, piece by piece: what `put` and `end` return, joined, is all of it.

    A token's bytes may be half a character, and a stop string may begin in one token and end in another: both are held
    back until it is known. decode(ids) gives the text of tokens; `before` are those of the prompt. With `strip` the
    text does not begin with white space.
    """

    def __init__(self, decode, stop=(), before=(), strip=False):
        self.decode, self.stop, self.strip = decode, [s for s in stop if s], strip
        self.ids = list(before)[-CONTEXT:]
        self.begin, self.read = 0, len(self.ids)  # ids[begin:read] have been given, and are what the next follow
        self.cut, self.held, self.stopped = 0, "", False

    def put(self, token) -> str:
        """What is certain of the text with one more token. After `stopped`, nothing."""
        self.ids.append(token)
        if self.stopped:
            return ""
        fresh = self._fresh()
        self.cut = self.cut + 1 if fresh.endswith(REPLACEMENT) else 0
        if 0 < self.cut < WHOLE:
            return ""
        return self._certain(self._take(fresh))

    def end(self) -> str:
        """What was held back; nothing else comes."""
        if self.stopped:
            return ""
        text = self._certain(self._take(self._fresh()))
        rest, self.held = self.held, ""
        return text if self.stopped else text + rest

    def _fresh(self):
        given = self.decode(self.ids[self.begin : self.read])
        return self.decode(self.ids[self.begin :])[len(given) :]

    def _take(self, fresh):
        if fresh:  # else a token without text, whose space may be the next one's
            self.begin, self.read, self.cut = self.read, len(self.ids), 0
        return fresh

    def _certain(self, fresh):
        text = self.held + fresh
        if self.strip:
            text = text.lstrip()
            self.strip = not text
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        if ends:
            self.held, self.stopped = "", True
            return text[: min(ends)]
        begun = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        cut = len(text) - begun
        self.held = text[cut:]
        return text[:cut]
