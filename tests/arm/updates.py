"""A server of host updates that answers ranges, writes down what was asked, and can be slow."""

from __future__ import annotations

import time
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

PIECE = 1 << 16


class Throttled(SimpleHTTPRequestHandler):
    asked: ClassVar[list[int]] = []  # the first byte of each range
    rate = 0  # bytes a second; 0: as fast as it goes

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size, offset = path.stat().st_size, 0
        if wanted := self.headers.get("Range"):
            offset = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.asked.append(offset)
        self.send_response(206 if offset else 200)
        self.send_header("Content-Length", str(size - offset))
        self.end_headers()
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                while piece := file.read(PIECE):
                    self.wfile.write(piece)
                    if self.rate:
                        time.sleep(len(piece) / self.rate)
        except OSError:  # the device is gone
            pass

    def log_message(self, *_: Any) -> None:
        pass
