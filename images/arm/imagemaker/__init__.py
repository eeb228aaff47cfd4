"""Makes disk images for ARM boards: see ../README.md. Standard library only."""
