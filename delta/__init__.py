"""Layer deltas: formats, maker and reader. Imports nothing of balenapy."""
