"""Words of Dockerfile instructions: quotes, escapes and `$variables`, as Docker's own little shell has them.

    expand(word, variables)        one word: quotes taken away, variables put in
    expand_words(word, variables)  the same, and split at blanks, also at those a variable brought in
    split_words(text)              cut a line into words that still have their quotes

Forms: `$x`, `${x}`, `${x:-w}`, `${x:+w}`; the escape character takes the meaning from what follows it; single quotes
keep everything, double quotes all but variables and escapes.

Source: moby 18.09 builder/dockerfile/shell/lex.go, parser/line_parsers.go parseWords.
"""

from __future__ import annotations

from collections.abc import Mapping

from balenapy.core.gotext import BLANKS, quote
from balenapy.errors import InvalidParameter

ESCAPE = "\\"
_SPECIAL = frozenset("@*#?-$!0")


def expand(word: str, variables: Mapping[str, str], escape: str = ESCAPE) -> str:
    """Raises: InvalidParameter `failed to process "${": syntax error: missing '}'`."""
    return _expand(word, variables, escape)[0]


def expand_words(word: str, variables: Mapping[str, str], escape: str = ESCAPE) -> list[str]:
    """Raises: as `expand`."""
    return _expand(word, variables, escape)[1]


def _expand(word: str, variables: Mapping[str, str], escape: str) -> tuple[str, list[str]]:
    try:
        return _Lexer(word, variables, escape).until("")
    except _Bad as error:
        raise InvalidParameter(f"failed to process {quote(word)}: {error}") from error


class _Bad(Exception):
    pass


class _Words:
    """Words in the making: blanks end one unless they were quoted."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._word = ""
        self._begun = False

    def add(self, text: str, *, quoted: bool) -> None:
        for character in text:
            if character in BLANKS and not quoted:
                self.end()
            else:
                self._word += character
                self._begun = True
        self._begun = self._begun or quoted

    def end(self) -> None:
        if self._begun:
            self.done.append(self._word)
        self._word, self._begun = "", False


class _Lexer:
    def __init__(self, text: str, variables: Mapping[str, str], escape: str) -> None:
        self._text = text
        self._at = 0
        self._variables = variables
        self._escape = escape

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        character = self._peek()
        self._at += 1
        return character

    def until(self, stop: str) -> tuple[str, list[str]]:
        result = ""
        words = _Words()
        while character := self._peek():
            if character == stop:
                self._next()
                break
            if character == "'":
                part = self._single_quoted()
                words.add(part, quoted=True)
            elif character == '"':
                part = self._double_quoted()
                words.add(part, quoted=True)
            elif character == "$":
                part = self._variable()
                words.add(part, quoted=False)
            else:
                part = self._next()
                quoted = part == self._escape
                if quoted:
                    part = self._next()
                    if not part:
                        break
                words.add(part, quoted=quoted)
            result += part
        else:
            if stop:
                raise _Bad(f"unexpected end of statement while looking for matching {stop}")
        words.end()
        return result, words.done

    def _single_quoted(self) -> str:
        self._next()
        end = self._text.find("'", self._at)
        if end < 0:
            raise _Bad("unexpected end of statement while looking for matching single-quote")
        part, self._at = self._text[self._at : end], end + 1
        return part

    def _double_quoted(self) -> str:
        self._next()
        result = ""
        while character := self._peek():
            if character == '"':
                self._next()
                return result
            if character == "$":
                result += self._variable()
                continue
            self._next()
            if character == self._escape:
                following = self._peek()
                if not following:
                    continue
                if following in ('"', "$", self._escape):
                    character = self._next()
            result += character
        raise _Bad("unexpected end of statement while looking for matching double-quote")

    def _variable(self) -> str:
        self._next()
        if self._peek() != "{":
            name = self._name()
            return self._variables.get(name, "") if name else "$"
        self._next()
        first = self._peek()
        if not first:
            raise _Bad("syntax error: missing '}'")
        if first in "{}:":
            raise _Bad("syntax error: bad substitution")
        name = self._name()
        after = self._next()
        value = self._variables.get(name, "")
        if after == "}":
            return value
        if after != ":":
            raise _Bad("missing ':' in substitution")
        modifier = self._next()
        try:
            word, _ = self.until("}")
        except _Bad:
            if not self._peek():
                raise _Bad("syntax error: missing '}'") from None
            raise
        if modifier == "+":
            return word if value else ""
        if modifier == "-":
            return value or word
        raise _Bad(f"unsupported modifier ({modifier}) in substitution")

    def _name(self) -> str:
        start = self._at
        first = self._peek()
        if first.isdigit():
            while self._peek().isdigit():
                self._at += 1
        elif first and first in _SPECIAL:
            self._at += 1
        else:
            while (character := self._peek()) and (character.isalnum() or character == "_"):
                self._at += 1
        return self._text[start : self._at]


def split_words(text: str, escape: str = ESCAPE) -> list[str]:
    """Cut at blanks outside quotes; quotes and escapes stay in the words."""
    words: list[str] = []
    word = mark = ""
    begun = False
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if not mark and character in BLANKS:
            if begun:
                words.append(word)
            word, begun = "", False
            continue
        if character == escape and mark != "'":
            if position == len(text):
                break  # at the end of a line it means nothing
            word += character + text[position]
            position += 1
            begun = True
            continue
        if mark:
            if character == mark:
                mark = ""
        elif character in "'\"":
            mark = character
        word += character
        begun = True
    if begun:
        words.append(word)
    return words
