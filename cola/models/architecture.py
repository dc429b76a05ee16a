"""Configurations of Hugging Face models, from files or from `model.architecture`.

They are checked against the problem here, before any weight exists.
"""

from typing import TYPE_CHECKING, Any

from cola.config.choices import Family, Objective
from cola.config.schema import ModelConfig
from cola.errors import ConfigError
from cola.interfaces import Problem
from cola.models.base import model_label
from cola.models.hub import PretrainedSource
from cola.models.tokenizer import word_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CLASSIFIES = (Objective.classification, Objective.regression)


def check_objective(model: ModelConfig, problem: Problem) -> None:
    """Refuses a text model for images, and an encoder for next tokens.

    Raises:
        ConfigError: what the task asks for, and models that can do it.
    """
    if problem.objective is Objective.image:
        raise ConfigError(
            f"model={model.name} reads text, but the task has images; "
            "choose model=linear, model=mlp or model=cnn"
        )
    if problem.objective is Objective.causal and model.family is Family.encoder:
        raise ConfigError(_no_decoder(model))


def is_classifier(problem: Problem) -> bool:
    """Whether the model ends in a classification (or regression) head."""
    return problem.objective in _CLASSIFIES


def auto_class(problem: Problem) -> Any:  # the library's Auto classes are not typed
    """The Hugging Face class family that builds models for the problem."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if is_classifier(problem) else AutoModelForCausalLM


def random_config(model: ModelConfig, problem: Problem) -> "PreTrainedConfig":
    """Configuration of a random model; its vocabulary is the word-level tokenizer's by default."""
    architecture = dict(model.architecture)
    if architecture.get("vocab_size") is None:
        architecture["vocab_size"] = len(word_vocabulary())
    return _checked(model, problem, _from_architecture(model, problem, architecture))


def pretrained_config(
    model: ModelConfig, problem: Problem, source: PretrainedSource, *, on_meta: bool
) -> "PreTrainedConfig":
    """Configuration of pretrained files; a dry run of a hub model takes `model.architecture`."""
    from transformers import AutoConfig

    if on_meta and not source.is_folder and model.architecture:
        config = _from_architecture(model, problem, model.architecture)
    else:
        config = AutoConfig.from_pretrained(
            source.location,
            local_files_only=source.local_files_only,
            **_head_settings(problem),
        )
    return _checked(model, problem, config)


def _from_architecture(
    model: ModelConfig, problem: Problem, architecture: dict[str, Any]
) -> "PreTrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if "model_type" not in architecture:
        raise ConfigError(f"model.architecture of {model.name} has no model_type")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**architecture, **_head_settings(problem))
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

    if is_classifier(problem):
        if config.model_type not in families.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise ConfigError(
                f"{model_label(model)} of model type {config.model_type!r} cannot classify text; "
                "choose another model"
            )
    elif (
        config.model_type not in families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        # Masked models do build as causal ones, but then every token sees its own label.
        or config.model_type in families.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ):
        raise ConfigError(_no_decoder(model))
    positions = getattr(config, "max_position_embeddings", None) or -1  # XLNet says -1: no limit
    if 0 < positions < problem.max_length:
        raise ConfigError(
            f"task.max_length={problem.max_length} exceeds the {positions} positions of "
            f"{model_label(model)}; set task.max_length to at most {positions}"
        )
    return config


def _no_decoder(model: ModelConfig) -> str:
    return (
        f"{model_label(model)} is no decoder, but the task predicts next tokens; "
        "choose a decoder (tiny-gpt2, hf with a causal model)"
    )
