"""Inputs made of good ones by damage: bits, numbers, blocks, words of the format; text and JSON by their structure."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, -1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 1e400, 1 << 62, 1 << 64, "", "\0", "sha256:" + "a" * 64, "sha256:", "\ud800",
    "x" * 5000, [], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, "9999-99-99T99:99:99Z", "0001-01-01T00:00:00Z",
)  # fmt: skip


def damage(data: bytes, words: Sequence[bytes], choose: random.Random) -> bytes:
    """One to six wounds."""
    result = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 3, 6))):
        at = choose.randrange(len(result) + 1)
        kind = choose.randrange(9)
        if kind == 0 and result:
            result[at % len(result)] ^= 1 << choose.randrange(8)
        elif kind == 1 and result:
            result[at % len(result)] = choose.randrange(256)
        elif kind == 2:
            del result[at:]
        elif kind == 3:
            end = at + choose.choice((1, 4, 100, 512))
            del result[at:end]
        elif kind == 4:
            start = choose.randrange(len(result) + 1)
            result[at:at] = result[start : start + choose.choice((1, 8, 512, 1024))]
        elif kind == 5:
            size = choose.choice((1, 2, 4, 8))
            number = choose.choice(NUMBERS) & ((1 << 8 * size) - 1)
            result[at : at + size] = number.to_bytes(size, choose.choice(("little", "big")))
        elif kind == 6 and words:
            word = choose.choice(words)
            result[at : at + choose.choice((0, len(word)))] = word
        elif kind == 7:
            result[at : at + 12] = b"%011o\0" % (choose.choice(NUMBERS) & 0xFFFFFFFF)
        else:
            result[at:at] = choose.randbytes(choose.choice((1, 16, 600)))
    return bytes(result)


def damage_json(data: bytes, words: Sequence[bytes], choose: random.Random) -> bytes:
    """Mostly by its structure, so that it stays JSON."""
    if choose.random() < 0.25:
        return damage(data, words, choose)
    document = json.loads(data)
    for _ in range(choose.choice((1, 1, 2, 4))):
        places = list(_places(document))
        if not places:
            break
        holder, key = choose.choice(places)
        kind = choose.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, place = choose.choice(places)
            holder[key] = copy.deepcopy(other[place])
        elif kind == 2 and isinstance(holder[key], str) and holder[key]:
            holder[key] = damage(holder[key].encode(errors="replace"), words, choose).decode(errors="replace")
        elif kind == 3 and isinstance(holder[key], list):
            holder[key] = holder[key] * choose.choice((2, 50))
        else:
            holder[key] = copy.deepcopy(choose.choice(VALUES))
        if len(raw := json.dumps(document).encode()) > 1 << 20:
            return raw
    return json.dumps(document).encode()


def _places(value: Any, depth: int = 0) -> Any:
    """Every (container, key) of a document."""
    if depth > 12:
        return
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key], depth + 1)
