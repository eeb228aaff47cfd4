"""Small programs for 64-bit ARM that are linked anew after a change: what addresses are foretold in."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field, replace

DATA_ADDRESS_GAP = 0x10000  # as linkers leave between code and data
TEXT_OFFSET = 0x200


@dataclass(frozen=True)
class Function:
    """Some instructions, and whom it calls and reads: (place in words, number of function or datum)."""

    words: tuple[int, ...]
    calls: tuple[tuple[int, int], ...] = ()
    reads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Program:
    functions: tuple[Function, ...]
    data: tuple[bytes, ...]
    pointers: tuple[int, ...] = field(default=())  # to functions


def random_program(rng: random.Random, functions: int = 12) -> Program:
    made = []
    for _ in range(functions):
        size = rng.randrange(8, 40)
        words = tuple(0xD503201F if rng.random() < 0.1 else rng.getrandbits(26) | 0x2000_0000 for _ in range(size))
        places = rng.sample(range(0, size - 2, 2), k=min(3, size // 4))
        calls = tuple((place, rng.randrange(functions)) for place in places[:2])
        reads = tuple((place, rng.randrange(6)) for place in places[2:])
        made.append(Function(words, calls, reads))
    data = tuple(rng.randbytes(rng.randrange(1, 60)) for _ in range(6))
    return Program(tuple(made), data, tuple(rng.randrange(functions) for _ in range(rng.randrange(20))))


def grown(rng: random.Random, program: Program) -> Program:
    """The same with a function longer and a datum longer: nearly all addresses change."""
    which = rng.randrange(len(program.functions))
    old = program.functions[which]
    more = tuple(rng.getrandbits(26) | 0x2000_0000 for _ in range(rng.randrange(1, 9)))
    longer = replace(old, words=old.words + more)
    functions = (*program.functions[:which], longer, *program.functions[which + 1 :])
    place = rng.randrange(len(program.data))
    data = (*program.data[:place], program.data[place] + rng.randbytes(rng.randrange(40)), *program.data[place + 1 :])
    return replace(program, functions=functions, data=data)


def link(program: Program) -> bytes:
    """The program as an ELF file."""
    starts, at = [], TEXT_OFFSET
    for function in program.functions:
        starts.append(at)
        at += 4 * len(function.words)
    text_end = at
    at += -at % 8
    data_offset = at
    bias = DATA_ADDRESS_GAP
    data_starts = []
    at += 8 * len(program.pointers)
    for datum in program.data:
        data_starts.append(at + bias)
        at += len(datum) + -len(datum) % 8
    code = bytearray()
    for start, function in zip(starts, program.functions, strict=True):
        words = list(function.words)
        for place, callee in function.calls:
            words[place] = 0x9400_0000 | (starts[callee] - start - 4 * place >> 2) & 0x3FF_FFFF
        for place, datum in function.reads:
            target, here = data_starts[datum], start + 4 * place
            pages = (target >> 12) - (here >> 12)
            words[place] = 0x9000_0003 | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
            words[place + 1] = 0x9100_0000 | (target & 0xFFF) << 10 | 3 << 5 | 3
        code += struct.pack(f"<{len(words)}I", *words)
    body = bytearray(code.ljust(data_offset - TEXT_OFFSET, b"\0"))
    body += struct.pack(f"<{len(program.pointers)}Q", *(starts[number] for number in program.pointers))
    for datum in program.data:
        body += datum + bytes(-len(datum) % 8)
    size = TEXT_OFFSET + len(body)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 183, 1, starts[0], 64, size, 0, 64, 56, 2, 64, 2, 0)
    header += struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, data_offset, data_offset, 0x1000)
    data_bytes = size - data_offset
    header += struct.pack("<IIQQQQQQ", 1, 6, data_offset, data_offset + bias, 0, data_bytes, data_bytes + 64, 0x1000)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, 1, 6, TEXT_OFFSET, TEXT_OFFSET, text_end - TEXT_OFFSET, 0, 0, 4, 0)
    return header.ljust(TEXT_OFFSET, b"\0") + bytes(body) + sections
