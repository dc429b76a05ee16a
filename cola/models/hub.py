"""Pretrained files: a local folder or the Hugging Face hub, checked before anything is loaded.

Turns the library's long failures into one message each, keeps its reports and progress bars out
of a run's output, and does not wait through its retries when there is no network.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from cola.config.schema import ModelConfig
from cola.errors import ColaError, ConfigError

_PROBE_SECONDS = 5.0
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model")
_OFFLINE = "without a network use model.path=FOLDER, a tiny model (model=tiny-bart) or task=digits"


@dataclass(frozen=True, kw_only=True)
class PretrainedSource:
    """Where the files of a pretrained model are.

    Attributes:
        location: folder, or id on the hub.
        is_folder: whether the location is a folder.
        local_files_only: whether to look in the folder or the hub's local cache alone.
    """

    location: str
    is_folder: bool
    local_files_only: bool


def find_source(model: ModelConfig, *, config_only: bool) -> PretrainedSource:
    """Resolves `model.path` without loading anything.

    Args:
        model: its path is a hub id or a folder.
        config_only: a dry run needs `config.json` alone, and never the network.

    Raises:
        ConfigError: no path, no such folder, or a folder that lacks files.
    """
    if model.path is None:
        raise ConfigError(
            f"model={model.name} needs model.path=HUB_ID or model.path=FOLDER; {_OFFLINE}"
        )
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        _check_folder(folder, config_only=config_only)
        return PretrainedSource(location=str(folder), is_folder=True, local_files_only=True)
    if model.path[0] in "./~" or model.path.count("/") > 1:
        raise ConfigError(f"model.path={model.path}: there is no such folder")
    return PretrainedSource(
        location=model.path,
        is_folder=False,
        local_files_only=config_only or not hub_answers(),
    )


def hub_answers() -> bool:
    """Whether the hub can be reached; one quick request, where the library would retry for long."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PROBE_SECONDS):
            return True
    except HTTPError:  # an answer, if not a friendly one
        return True
    except URLError as error:  # the library may trust a certificate that urllib does not
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False


def stored_shapes(source: PretrainedSource) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder's safetensors files, by name; only headers are read."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    if source.is_folder:
        for path in sorted(Path(source.location).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


@contextmanager
def loading(model: ModelConfig, source: PretrainedSource) -> Iterator[None]:
    """Loads quietly, and names the cause in one message if the library cannot.

    Raises:
        ConfigError: what the library could not find or read, and what to change.
    """
    from safetensors import SafetensorError

    try:
        with _quiet_transformers():
            yield
    except ColaError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        if refusal := _explain_refusal(model, error):
            raise ConfigError(refusal) from error
        if source.local_files_only and not source.is_folder:
            raise ConfigError(
                f"model.path={model.path} is neither a folder nor in the hub's local cache, and "
                f"the hub was not reached (a dry run never asks it); {_OFFLINE}"
            ) from error
        cause = str(error).strip().partition("\n")[0]
        raise ConfigError(f"model.path={model.path} cannot be loaded: {cause}") from error


def _explain_refusal(model: ModelConfig, error: BaseException) -> str | None:
    """What to do about a model that the hub does not hand out, or None for any other failure."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = [error]  # transformers wraps what the hub said
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    page, has_token = f"https://huggingface.co/{model.path}", get_token() is not None
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        first = f"model.path={model.path} is gated: accept its licence at {page}, "
        if has_token:
            return (
                f"{first}with the account of the token in use, and wait until access is granted "
                "(hf auth whoami names the account); or use model.path=FOLDER"
            )
        return f"{first}then run hf auth login or set HF_TOKEN; or use model.path=FOLDER"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        sees = "the token in use sees" if has_token else "without a token one sees"
        return (
            f"model.path={model.path}: {sees} no such model on the hub, nor is there such a "
            f"folder; check the spelling at {page}, or run hf auth login if it is private"
        )
    return None


def _check_folder(folder: Path, *, config_only: bool) -> None:
    required: dict[str, tuple[str, ...]] = {"config.json": ("config.json",)}
    if not config_only:
        required["weights (*.safetensors or pytorch_model.bin)"] = _WEIGHTS
        required["tokenizer (tokenizer.json or a vocabulary)"] = _TOKENIZERS
    missing = [
        what
        for what, patterns in required.items()
        if not any(any(folder.glob(pattern)) for pattern in patterns)
    ]
    if missing:
        raise ConfigError(
            f"model.path={folder} lacks {' and '.join(missing)}; "
            "save the model and its tokenizer there with save_pretrained"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
