"""A fleet container engine that speaks the Docker Engine API v1.39."""

__version__ = "0.1.0"
