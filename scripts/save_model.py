"""Writes the model of a fully fine-tuned run as a folder that `model.path` and transformers load.

    python scripts/save_model.py RUN FOLDER

RUN is the folder of a finished run with method=ft; its best parameters are written. FOLDER then
holds what `from_pretrained` needs, the tokenizer included.
"""

import argparse
import sys
from pathlib import Path

import torch

from cola.checkpoint import peek_state
from cola.config.choices import MethodName
from cola.config.identity import CONFIG_FILE, load_config
from cola.experiment import build_problem
from cola.models import build_base_model


def main() -> int:
    """Builds the run's model, puts its parameters in, and saves it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.run / CONFIG_FILE)
    state = peek_state(arguments.run / "checkpoints")
    if config.method.name is not MethodName.ft or state is None:
        parser.error(f"{arguments.run} is no finished run with method=ft")
    base = build_base_model(config.model, build_problem(config), seed=config.seed)
    own = dict(base.module.named_parameters())
    with torch.no_grad():
        for name, value in state["learner"]["parameters"].items():
            own[name].copy_(value)
    base.module.save_pretrained(arguments.folder)
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
