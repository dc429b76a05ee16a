"""`cola-evaluate`: scores, per-user scores, samples and generated text of a run's checkpoint."""

import textwrap
from collections.abc import Sequence

from cola.cli.console import command_parser, run_console
from cola.cli.outcome import BAD_CONFIG, DONE, FAILED, INTERRUPTED
from cola.config.evaluation import OWN_KEYS, change_settings, changeable_keys, resolve_request
from cola.config.groups import group_choices
from cola.config.keys import find_key, nearest_words, schema_keys, word
from cola.config.validation import validate
from cola.errors import ConfigError

NAME = "cola-evaluate"

_HELP = """\
usage: {name} run=PATH [key=value ...]

Evaluates a run's checkpoint: the task's metric, scores per user, samples, and text where the model
writes. Prints a table and writes RUN/evaluations/TIMESTAMP.json; nothing else of the run is
touched, and it may still be running.

Examples:
  {name} run=outputs/synthetic/RUN_ID
  {name} run=PATH evaluation.merge=merged            # adapters inside the base weights
  {name} run=PATH checkpoint=newest split=selection  # of a run that goes on
  {name} run=PATH generation.num_beams=8 task.max_eval_rows=100
  {name} run=PATH prompt="category open_qa text the fox"
  {name} run=PATH user=open_qa prompt="..."          # by that user's adapters

Options:
  -h, --help        this text
  --version         the package's version

What to evaluate:
{own}
Settings that may differ from the run's (with the schema's defaults; the run's own count):
{settings}
Exit codes:
  {done}    done
  {failed}    the evaluation failed (traceback in the log)
  {bad}    no such run or checkpoint, a bad setting, or one that the run was trained with
  {interrupted}  interrupted
"""


def run_evaluation(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: arguments without the program's name; None: the process's own.
    """
    parser = command_parser(NAME, "run=PATH [key=value ...] (see --help)")
    parser.add_argument("lines", nargs="*")
    return run_console(
        parser, argv, help_text=_help_text, action=lambda arguments: _evaluate(arguments.lines)
    )


def main() -> int:
    """Console script."""
    return run_evaluation()


def _evaluate(lines: Sequence[str]) -> int:
    own, overrides = {}, []
    for line in lines:
        name, sign, value = line.partition("=")
        if name in OWN_KEYS and sign:
            own[name] = value  # as it is: a prompt may hold what Hydra would have quoted
        else:
            _check_name(line, name)
            overrides.append(line)

    request = resolve_request(own)
    if overrides:
        from cola.config.store import compose_changes  # Hydra takes half a second to import

        changes = compose_changes(overrides)
        request = change_settings(request, changes.config, changes.given)
    validate(request.config)

    from cola.evaluate_run import evaluate_run  # torch: only after the request was checked

    evaluate_run(request)
    return DONE


def _check_name(line: str, name: str) -> None:
    if name in group_choices() or find_key(name) is not None:
        return
    known = [*OWN_KEYS, *changeable_keys()]
    near = nearest_words(name, known)
    raise ConfigError(f"{line}: no such key; {near}allowed: {', '.join(known)}")


def _help_text() -> str:
    keys = schema_keys()
    settings = ", ".join(f"{name}={word(keys[name].default)}" for name in changeable_keys())
    return _HELP.format(
        name=NAME,
        own="".join(f"  {key:<12}{text}\n" for key, text in OWN_KEYS.items()),
        settings=textwrap.fill(
            settings.replace("???", "GROUP"), 100, initial_indent="  ", subsequent_indent="  "
        )
        + "\n",
        done=DONE,
        failed=FAILED,
        bad=BAD_CONFIG,
        interrupted=INTERRUPTED,
    )
