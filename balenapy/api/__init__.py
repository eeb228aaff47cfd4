"""The Docker Engine API v1.39 over HTTP."""
