"""Text of `--help`: what a command does, every group with its choices, every key with its default.

Read from `conf/` and the schema, so that it cannot go stale. No Hydra here: it has to answer in a
second.
"""

import textwrap
from collections.abc import Collection, Sequence

from cola.config.groups import choice_families, describe_choice, group_choices
from cola.config.keys import schema_keys, section_names, word

_WIDTH = 100

_OPTIONS = """\
Options:
  -h, --help        this text
  --version         the package's version
  -m, --multirun    a sweep: one run for each combination of values (a,b or range(1,4)); add
                    hydra/launcher=parallel for several at a time, one for each GPU, and
                    resume=once to skip finished runs when it is started again
  --cfg job         print the composed configuration as YAML and exit
"""

_RUN_DIR = """\
  hydra.run.dir  the run's folder (outputs/TASK/RUN_ID; an experiment's name instead of the task's)
"""

_EXIT_CODES = """\
Exit codes:
  0    done
  1    the run failed (traceback in the log){failure}
  2    bad configuration or data; nothing was trained
  130  interrupted; `resume=auto` goes on from the last checkpoint
"""


def help_text(
    name: str,
    summary: str,
    examples: Sequence[str],
    failure: str = "",
    *,
    hidden: Collection[str] = ("bench",),
    options: str = _OPTIONS,
    run_dir: str = _RUN_DIR,
) -> str:
    """The whole text.

    Args:
        name: of the command.
        summary: what it does, one paragraph.
        examples: command lines, each with a comment.
        failure: what else exit code 1 means for this command.
        hidden: sections of keys that the command does not read.
        options: lines of the command's own.
        run_dir: where it writes.
    """
    parts = [
        f"usage: {name} [options] [group=choice ...] [key=value ...]\n",
        textwrap.fill(summary, _WIDTH) + "\n",
        "Examples:\n" + "".join(f"  {example}\n" for example in examples),
        options,
        "Groups (group=choice; a task brings its own model, the command line wins):\n" + _groups(),
        "Keys (key=value, with the schema's defaults; groups may set others):\n"
        + _keys(hidden)
        + run_dir,
        _EXIT_CODES.format(failure=failure),
    ]
    return "\n".join(parts)


def _groups() -> str:
    lines = []
    for group, choices in group_choices().items():
        lines.append(f"  {group}")
        for name, ends in choice_families(choices):
            words = f"{name}_*" if ends else name
            lines.append(
                textwrap.fill(
                    _description(group, name, ends),
                    _WIDTH,
                    initial_indent=f"    {words:<14} ",
                    subsequent_indent=" " * 19,
                )
            )
    return "\n".join(lines) + "\n"


def _description(group: str, name: str, ends: Sequence[str]) -> str:
    """What a choice is; of a family, what its members have in common and how their names end."""
    if not ends:
        return describe_choice(group, name)
    common = describe_choice(group, f"{name}_{ends[0]}").partition(":")[0]
    return f"{common}: {', '.join(ends)}."


def _keys(hidden: Collection[str]) -> str:
    lines = []
    for section in ("", *section_names()):
        if section in hidden:
            continue
        keys = [k for k in schema_keys().values() if k.path.rpartition(".")[0] == section]
        words = ", ".join(f"{k.path.rpartition('.')[2]}={_default(k.default)}" for k in keys)
        title = f"  {section}." if section else "  (root)"
        lines.append(
            textwrap.fill(words, _WIDTH, initial_indent=f"{title:<15} ", subsequent_indent=" " * 16)
        )
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    return "GROUP" if value == "???" else word(value)
