"""Where `conf/` is and which choices its groups offer, read from the file names.

No Hydra here: `--help` lists the choices, and overrides are checked against them before anything is
composed.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import cola
from cola.errors import ConfigError


def conf_dir() -> Path:
    """Folder of the YAML files: packaged in a wheel as `cola/conf`, else `conf` of the repository.

    Raises:
        ConfigError: neither exists (a broken installation).
    """
    package = Path(cola.__file__).resolve().parent
    # The packaged folder first: beside an installed package, `conf` may be somebody else's.
    candidates = [package / "conf", package.parent / "conf"]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder
    places = " or ".join(str(folder) for folder in candidates)
    raise ConfigError(f"conf/config.yaml not found in {places}; reinstall the package")


def group_choices() -> dict[str, list[str]]:
    """Choices of every group, both sorted by name."""
    groups = sorted(folder for folder in conf_dir().iterdir() if folder.is_dir())
    return {group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in groups}


def choice_families(choices: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Choices that share what stands before their first underscore, together.

    Args:
        choices: of one group, sorted.

    Returns:
        Families as (`table2`, [`ft`, `lora`]); a choice that shares nothing as (its name, []).
    """
    families = []
    for prefix, members in itertools.groupby(choices, key=lambda choice: choice.partition("_")[0]):
        names = list(members)
        ends = [name.removeprefix(f"{prefix}_") for name in names]
        families.append((prefix, ends) if len(names) > 1 else (names[0], []))
    return families


def describe_choice(group: str, choice: str) -> str:
    """What a choice is: the first comment line of its file."""
    lines = (conf_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines()
    comments = (line.removeprefix("# ") for line in lines if not line.startswith("# @package"))
    return next(comments, "")
