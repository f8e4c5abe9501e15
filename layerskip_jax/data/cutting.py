"""Cut a long text into documents of a few thousand characters."""

import re
from collections.abc import Iterator

CHARACTERS = 4000
"""A piece ends at the first place to cut after this many characters."""

ENDS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"  # as `str.splitlines`
# CR LF is one line end. Python 3.11.2 loops forever on possessive quantifiers and atomic groups, so use neither.
LINE_END = rf"(?:\r\n|(?!\r\n)[{ENDS}])"
CHARACTER = r"(?:\r\n|(?!\r\n)(?s:.))"
INVISIBLE = r"\u200b\u2060\ufeff"
LINE = re.compile(LINE_END)
BLANK_LINE = re.compile(rf"{LINE_END}(?:[^\S{ENDS}]|[{INVISIBLE}])*{LINE_END}")
BLANK = re.compile(rf"[\s{INVISIBLE}]*")

Span = tuple[int, int]


def cut_text(text: str, characters: int = CHARACTERS) -> list[Span]:
    """Return the spans of the pieces of ``text`` that are not blank. Most pieces have at least ``characters``.

    Cut the text at blank lines into pieces of at least ``characters``. Cut those longer than twice ``characters`` at
    line ends, again into pieces of at least ``characters``. Cut those that are still longer than twice ``characters``
    into pieces of about ``characters``, after a space where there is one. CR LF counts as one character, so that texts
    with CR LF and with LF are cut in the same places.
    """
    spans: list[Span] = list(_cut_at(BLANK_LINE, text, (0, len(text)), characters))
    spans = [piece for span in spans for piece in _cut_long(LINE, text, span, characters)]
    most = rf"{CHARACTER}{{1,{characters}}}"
    anywhere = re.compile(rf"{most}(?:\r\n|\s|\Z)|{most}")
    spans = [piece for span in spans for piece in _cut_long(anywhere, text, span, characters)]
    return [span for span in spans if not BLANK.fullmatch(text, *span)]


def _length(text: str, start: int, end: int) -> int:
    return end - start - text.count("\r\n", start, end)


def _cut_long(pattern: re.Pattern[str], text: str, span: Span, characters: int) -> Iterator[Span]:
    if _length(text, *span) <= 2 * characters:
        yield span
    elif pattern is LINE:
        yield from _cut_at(LINE, text, span, characters)
    else:
        yield from (found.span() for found in pattern.finditer(text, *span))


def _cut_at(separator: re.Pattern[str], text: str, span: Span, characters: int) -> Iterator[Span]:
    start, end = span
    while start < end:
        first = min(start + characters, end)
        while first > start and BLANK.fullmatch(text, first - 1, first):
            first -= 1  # to the first of several separators in a row
        places = separator.finditer(text, first, end)
        found = next((place for place in places if _length(text, start, place.start()) >= characters), None)
        yield start, found.start() if found else end
        start = found.end() if found else end
