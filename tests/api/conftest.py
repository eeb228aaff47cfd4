from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"


@pytest.fixture(scope="session")
def http_heads() -> dict[str, list[str]]:
    """Heads of the reference engine, status line first."""
    return cast(dict[str, list[str]], json.loads((FIXTURES / "http_heads.json").read_text()))
