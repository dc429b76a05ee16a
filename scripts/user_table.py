"""Prints Table 4 or 8 of finished runs, with the paper's values in parentheses.

    python scripts/user_table.py 4 outputs

Values are percent: the mean over seeds, and the standard deviation where there are several.
"""

import argparse
import sys
from pathlib import Path

from cola.report.user_table import read_runs, user_table


def main() -> int:
    """Writes the table to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["4", "8"])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")])
    arguments = parser.parse_args()
    sys.stdout.write(user_table(arguments.table, read_runs(arguments.folders)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
