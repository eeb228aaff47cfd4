from pathlib import Path


def main() -> None:
    print("version", Path("version.txt").read_text().strip())
