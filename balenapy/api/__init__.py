"""The Docker Engine API v1.39 over HTTP."""

from balenapy import lean

lean.load("trio", "h11", "hypercorn.trio.tcp_server", "quart_trio")
