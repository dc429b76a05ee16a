"""Which of a batch's padded texts the rows of a site belong to.

Known from the model's structure: everything reads the input, but for the decoder of a model that
writes a text from another one. There, cross-attention takes keys and values from the encoder; how
Hugging Face names it is the only thing that tells. A wrong or missing answer costs no exactness:
what may stay behind is checked once in a run (`cola.row_dropping`).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from cola.config.choices import Objective
from cola.sites import RowStream, SiteName, SiteSpec
from cola.task_data import Problem

_CROSS_ATTENTION = re.compile(
    r"(^|\.)(encoder_attn|encdecattention|cross_?attn|cross_?attention)\.", re.IGNORECASE
)
_OF_ENCODER = {"k", "v", "k_proj", "v_proj", "key", "value", "key_proj", "value_proj"}
_OF_DECODER = {"q", "q_proj", "query", "query_proj", "o", "o_proj", "out_proj", "dense"}


def with_streams(
    sites: Mapping[SiteName, SiteSpec], module: nn.Module, problem: Problem
) -> dict[SiteName, SiteSpec]:
    """The sites of a text model, each with the text that its rows are tokens of.

    Args:
        sites: of the model.
        module: a Hugging Face model.
        problem: one that classifies reads the same text in its encoder and its decoder.
    """
    if problem.objective is not Objective.seq2seq:
        return {
            name: spec if spec.is_head else replace(spec, stream=RowStream.inputs)
            for name, spec in sites.items()
        }
    encoder, decoder = _part(module, "get_encoder"), _part(module, "get_decoder")
    return {
        name: replace(spec, stream=_stream(name, encoder, decoder)) for name, spec in sites.items()
    }


def _part(module: Any, find: str) -> str | None:  # a PreTrainedModel, whose methods are not typed
    """Dotted prefix of the encoder or decoder; None if the model has no such part."""
    part = getattr(module, find)()
    names = (name for name, child in module.named_modules() if name and child is part)
    return next((f"{name}." for name in names), None)


def _stream(name: SiteName, encoder: str | None, decoder: str | None) -> RowStream:
    if encoder is not None and name.startswith(encoder):
        return RowStream.inputs
    if decoder is None or not name.startswith(decoder):
        return RowStream.whole
    if not _CROSS_ATTENTION.search(name):
        return RowStream.targets
    last = name.rpartition(".")[2]
    if last in _OF_ENCODER:
        return RowStream.inputs
    return RowStream.targets if last in _OF_DECODER else RowStream.whole
