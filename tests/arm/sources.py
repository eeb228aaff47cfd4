"""The image builder's and the image's own modules, importable by the tests."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
IMAGES = REPOSITORY / "images"
OVERLAY = IMAGES / "arm" / "root"

for place in (IMAGES, IMAGES / "arm", OVERLAY / "usr/lib/balenapy-os"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
