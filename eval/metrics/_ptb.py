"""The tokens of a caption as pycocoevalcap counts them, without Java.

pycocoevalcap writes all captions into a file, one a line, runs Stanford's PTBTokenizer 3.4.1 over it
(-preserveLines -lowerCase) and drops marks. What is a token says `_ptb_rules`. Other than there, a caption
never depends on the one in the next line: it is read as if that began with "A", as most do. Of texts that
end in "no.", "fig." and the like, or in a single letter and a period, the original keeps or drops that
period by what the next caption is.
"""

from __future__ import annotations

import re
from functools import lru_cache

from flamingo.eval.metrics._ptb_rules import BLANKS, RULES

# The names of brackets stay: the original lists them in capitals, but all is lower case by then.
MARKS = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
NEXT = "\nA \n"
BREAKS = str.maketrans(dict.fromkeys("\n\r\x0b\x0c\u2028\u2029", " "))
BLANK = re.compile(f"[{BLANKS}]+")
# Between blanks a word of plain letters is a token whatever the rules, but for these. Most are such.
PLAIN = re.compile("(?!(?:cannot|gimme|gonna|gotta|lemme|wanna)\\b)[a-z]+(?=[ \n])", re.IGNORECASE | re.ASCII)


@lru_cache(maxsize=1 << 19)
def tokenize(caption: str) -> str:
    """Tokens in lower case, a blank between, without marks. A token may hold a no-break space."""
    found = (token.lower() for token in tokens(caption.translate(BREAKS)))
    return " ".join(token for token in found if token not in MARKS).rstrip()


def words(caption: str) -> list[str]:
    """The tokens as CIDEr and BLEU take them: those with a no-break space are two."""
    return tokenize(caption).split()


def tokens(text: str) -> list[str]:
    """Of one line, marks included, but for those that are always dropped."""
    text = utf16(text.rstrip(" ")) + NEXT
    found, at, end = [], 0, len(text) - len(NEXT)
    while at < end:
        if text[at] == " " and (blank := BLANK.match(text, at)):
            at = blank.end()
        elif plain := PLAIN.match(text, at):
            found.append(plain[0])
            at = plain.end()
        else:
            token, at = one(text, at)
            if token:
                found.append(from_utf16(token))
    return found


def one(text: str, at: int) -> tuple[str, int]:
    """The token that starts there, and where it ends. What no rule takes, such as emoji, is dropped."""
    furthest, made, end = at, str, at + 1
    for rule in RULES:
        match = rule.pattern.match(text, at)
        if match and match.end() > furthest:
            furthest, made, end = match.end(), rule.made, match.end(1)
    return (made(text[at:end]) if furthest > at else ""), end


def utf16(text: str) -> str:
    """Characters outside of the basic plane as two, as Java has them."""
    if text.isascii() or max(text) < "\U00010000":
        return text
    units = memoryview(text.encode("utf-16", "surrogatepass")[2:]).cast("H")
    return "".join(map(chr, units))


def from_utf16(text: str) -> str:
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
