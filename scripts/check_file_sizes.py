"""Fails if a file that git tracks or would add is larger than 500 kB; data lives elsewhere."""

import subprocess
import sys
from pathlib import Path

LIMIT_BYTES = 500_000


def main() -> int:
    """Returns 1 and names the files if any is too large."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        text=True,
    )
    files = [Path(name) for name in listing.stdout.split("\0") if name]
    large = [file for file in files if file.is_file() and file.stat().st_size > LIMIT_BYTES]
    for file in large:
        print(f"{file}: {file.stat().st_size} bytes, more than {LIMIT_BYTES}", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
