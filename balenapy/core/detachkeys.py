"""The keys with which a user leaves a terminal without ending what runs there.

Keys are looked for byte by byte. Bytes that match the beginning of the sequence are held back; when the sequence breaks
they are passed on. Source: moby pkg/term/ascii.go, proxy.go.
"""

from __future__ import annotations

from balenapy.errors import InvalidParameter

DEFAULT_KEYS = b"\x10\x11"  # ctrl-p,ctrl-q

_CONTROL = "@abcdefghijklmnopqrstuvwxyz[\\]^_"  # position is the code


def parse_keys(text: str) -> bytes:
    """`ctrl-p,ctrl-q`, `a,DEL` -> the bytes; "" is the default.

    Raises: InvalidParameter with the offending key as its whole message; the caller words the sentence.
    """
    if not text:
        return DEFAULT_KEYS
    keys = bytearray()
    for key in text.split(","):
        if len(key) == 1 and key.isascii():
            keys += key.encode()
        elif key == "DEL":
            keys.append(127)
        elif key.startswith("ctrl-") and len(key) == 6 and key[5].lower() in _CONTROL:
            keys.append(_CONTROL.index(key[5].lower()))
        else:
            raise InvalidParameter(key)
    return bytes(keys)


class KeyFilter:
    """`feed` input, get what is passed on; `detached` once the whole sequence was typed."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._matched = 0
        self.detached = False

    def feed(self, data: bytes) -> bytes:
        """What comes after the sequence is dropped."""
        if not self._keys:
            return data
        passed = bytearray()
        for byte in data:
            if byte == self._keys[self._matched]:
                self._matched += 1
                if self._matched == len(self._keys):
                    self.detached = True
                    return bytes(passed)
                continue
            if self._matched:
                passed += self._keys[: self._matched]
                self._matched = 0
                if byte == self._keys[0]:  # the broken sequence may be followed by a whole one
                    self._matched = 1
                    if len(self._keys) == 1:
                        self.detached = True
                        return bytes(passed)
                    continue
            passed.append(byte)
        return bytes(passed)
