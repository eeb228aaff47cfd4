"""Builds: cases recorded from Debian's dockerd 20.10 (its legacy builder), and what they say of an engine."""
