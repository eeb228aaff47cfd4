from __future__ import annotations

from random import Random

from balenapy.core.creation import NAME_PATTERN
from balenapy.core.names import ADJECTIVES, SURNAMES, generate_name


def test_every_name_is_a_legal_container_name() -> None:
    assert all(NAME_PATTERN.fullmatch(f"{adjective}_x") for adjective in ADJECTIVES)
    assert all(NAME_PATTERN.fullmatch(f"x_{surname}") for surname in SURNAMES)
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(SURNAMES)) == len(SURNAMES)


def test_a_retry_appends_a_digit() -> None:
    assert generate_name(lambda _: 0) == f"{ADJECTIVES[0]}_{SURNAMES[0]}"
    assert generate_name(lambda _: 0, retry=1) == f"{ADJECTIVES[0]}_{SURNAMES[0]}0"
    assert len({generate_name(Random(seed).randrange) for seed in range(200)}) > 180
