"""Splits a set's training rows in two, so that a base model can be trained on one half.

    python scripts/halve_rows.py DATA/web_nlg/webnlg_challenge_2017 OUT/base OUT/users

Rows of even number go to the first folder and of odd number to the second, so that both have all of
the set's categories; every other split goes to both. The path below DATA is kept.
"""

import argparse
import gzip
import shutil
import sys
from pathlib import Path


def main() -> int:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the set, DATA/NAME/SUBSET")
    parser.add_argument("halves", type=Path, nargs=2)
    arguments = parser.parse_args()
    below = Path(*arguments.source.parts[-2:])
    with gzip.open(arguments.source / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = file.readlines()
    for first, half in enumerate(arguments.halves):
        folder = half / below
        folder.mkdir(parents=True, exist_ok=True)
        for file_name in arguments.source.glob("*.jsonl.gz"):
            if file_name.name != "train.jsonl.gz":
                shutil.copyfile(file_name, folder / file_name.name)
        with gzip.open(folder / "train.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(rows[first::2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
