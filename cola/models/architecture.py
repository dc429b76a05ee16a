"""Configurations of Hugging Face models, from files or from `model.architecture`.

They tell which family a model belongs to, and are checked against the problem here, before any
weight exists.
"""

from typing import TYPE_CHECKING, Any

from cola.config.choices import Family, ModelSource, Objective
from cola.config.schema import ModelConfig
from cola.errors import ConfigError
from cola.models.base import model_label
from cola.models.hub import PretrainedSource, find_source, loading
from cola.models.tokenizer import word_vocabulary
from cola.task_data import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_WRITERS = {Objective.causal: Family.decoder, Objective.seq2seq: Family.seq2seq}
"""Family that each objective of writing text needs; every family can classify."""

_NO_WRITER = {
    Family.decoder: "no decoder, but the task predicts next tokens; choose a decoder (tiny-gpt2, "
    "tiny-llama, gpt2, hf with a causal model)",
    Family.seq2seq: "no encoder-decoder, but the task turns text into text; choose an "
    "encoder-decoder (tiny-bart, bart-base, hf with one such as T5)",
}


def resolve_family(model: ModelConfig, *, on_meta: bool = False) -> Family | None:
    """What a model is built for: what it states, or for pretrained files what their config says.

    Args:
        model: its configuration.
        on_meta: a dry run, which never asks the network.

    Raises:
        ConfigError: `config.json` is out of reach or cannot be read.
    """
    if model.family is not None or model.source is not ModelSource.pretrained:
        return model.family
    source = find_source(model, config_only=on_meta)
    with loading(model, source):
        return _family(_read_config(model, source, {}, on_meta=on_meta))


def check_objective(model: ModelConfig, problem: Problem) -> None:
    """Refuses a text model for images, and one of another family for writing text.

    Raises:
        ConfigError: what the task asks for, and models that can do it.
    """
    if problem.objective is Objective.image:
        raise ConfigError(
            f"model={model.name} reads text, but the task has images; "
            "choose model=linear, model=mlp or model=cnn"
        )
    wanted = _WRITERS.get(problem.objective)
    if wanted is not None and model.family not in (None, wanted):
        raise ConfigError(f"{model_label(model)} is {_NO_WRITER[wanted]}")


def is_classifier(problem: Problem) -> bool:
    """Whether the model ends in a classification (or regression) head."""
    return problem.objective not in _WRITERS


def auto_class(problem: Problem) -> Any:  # the library's Auto classes are not typed
    """The Hugging Face class family that builds models for the problem."""
    import transformers

    names = {
        Objective.causal: "AutoModelForCausalLM",
        Objective.seq2seq: "AutoModelForSeq2SeqLM",
    }
    return getattr(transformers, names.get(problem.objective, "AutoModelForSequenceClassification"))


def random_config(model: ModelConfig, problem: Problem) -> "PreTrainedConfig":
    """Configuration of a random model; its vocabulary is the word-level tokenizer's by default."""
    architecture = dict(model.architecture)
    if architecture.get("vocab_size") is None:
        architecture["vocab_size"] = len(word_vocabulary())
    architecture |= _head_settings(problem)
    return _checked(model, problem, _from_architecture(model, architecture))


def pretrained_config(
    model: ModelConfig, problem: Problem, source: PretrainedSource, *, on_meta: bool
) -> "PreTrainedConfig":
    """Configuration of pretrained files; a dry run of a hub model takes `model.architecture`."""
    config = _read_config(model, source, _head_settings(problem), on_meta=on_meta)
    return _checked(model, problem, config)


def _read_config(
    model: ModelConfig, source: PretrainedSource, settings: dict[str, Any], *, on_meta: bool
) -> "PreTrainedConfig":
    from transformers import AutoConfig

    if on_meta and not source.is_folder and model.architecture:
        return _from_architecture(model, {**model.architecture, **settings})
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        source.location, local_files_only=source.local_files_only, **settings
    )
    return config


def _from_architecture(model: ModelConfig, architecture: dict[str, Any]) -> "PreTrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if "model_type" not in architecture:
        raise ConfigError(f"model.architecture of {model.name} has no model_type")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**architecture)
    except (ValueError, TypeError, StrictDataclassError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"model.architecture of {model.name} is invalid: {cause}") from error
    return config


def _head_settings(problem: Problem) -> dict[str, Any]:
    return {"num_labels": problem.num_labels} if is_classifier(problem) else {}


def _checked(
    model: ModelConfig, problem: Problem, config: "PreTrainedConfig"
) -> "PreTrainedConfig":
    from transformers.models.auto import modeling_auto as families

    wanted = _WRITERS.get(problem.objective)
    if wanted is not None:
        if _family(config) is not wanted:
            raise ConfigError(f"{model_label(model)} is {_NO_WRITER[wanted]}")
    elif config.model_type not in families.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ConfigError(
            f"{model_label(model)} of model type {config.model_type!r} cannot classify text; "
            "choose another model"
        )
    positions = getattr(config, "max_position_embeddings", None) or -1  # XLNet says -1: no limit
    if 0 < positions < problem.max_length:
        raise ConfigError(
            f"task.max_length={problem.max_length} exceeds the {positions} positions of "
            f"{model_label(model)}; set task.max_length to at most {positions}"
        )
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):  # M2M: a layer left out at random would be a site that is
            setattr(config, name, 0.0)  # silent, and every method is to train the same model
    return config


def _family(config: "PreTrainedConfig") -> Family:
    from transformers.models.auto import modeling_auto as families

    if config.is_encoder_decoder:
        writes = config.model_type in families.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        return Family.seq2seq if writes else Family.encoder
    # Masked models do build as causal ones, but then every token sees its own label.
    is_decoder = (
        config.model_type in families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in families.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return Family.decoder if is_decoder else Family.encoder
