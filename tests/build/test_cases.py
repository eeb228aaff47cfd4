"""Every case of the corpus: the engine says and builds what was recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.build.case import Case, load_cases
from tests.build.place import Place, prepare, running_server
from tests.build.play import differences, is_missing, play, written
from tests.engine_process import running_engine
from tests.leftovers import Leftovers

pytestmark = pytest.mark.root

CASES = load_cases()
LEAST_CASES = 80


@pytest.fixture(scope="module")
def place(nothing_left_behind: Leftovers, tmp_path_factory: pytest.TempPathFactory, registry: str) -> Iterator[Place]:
    with (
        running_server() as server,
        running_engine(tmp_path_factory.mktemp("build"), "--experimental") as engine,
    ):
        if reason := is_missing(engine):
            pytest.skip(reason)
        yield prepare(engine, registry, server)
        assert engine.is_alive, f"the engine died during the builds:\n{engine.log_tail()}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(place: Place, case: Case) -> None:
    if place.engine.is_reference and case.skip_reference:
        pytest.skip(case.skip_reference)

    answer = play(case, place)

    expected = case.recorded() if place.engine.is_reference else case.expected()
    other = differences(written(expected), written(answer))
    assert not other, other


def test_the_corpus_is_whole() -> None:
    """Enough cases, each with its answer, and none twice."""
    requests = [case.builds for case in CASES]

    assert len(CASES) >= LEAST_CASES
    assert [case.name for case in CASES if not case.expected_path.exists()] == []
    assert [one for number, one in enumerate(requests) if one in requests[:number]] == []
