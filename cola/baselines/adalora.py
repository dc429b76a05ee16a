"""AdaLoRA's budget of ranks: what its adapters need beside gradient descent.

The PEFT library holds the algorithm (Zhang et al. 2023) but leaves it to the loop to drive: after
every optimizer step the importance of each singular value is measured and, on a cubic schedule, the
least important ones over all sites are set to zero. The penalty that keeps the singular vectors
orthogonal PEFT adds only to a loss of its own, so it is computed here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cola.errors import SiteError

ADAPTER = "default"
"""PEFT's name of the one adapter set."""


class RankBudget:
    """Moves ranks between the sites of an AdaLoRA model."""

    def __init__(self, tuner: Any) -> None:  # an AdaLoraModel, which is not typed
        """Args: tuner: PEFT's AdaLoRA model, its schedule set in adaptations."""
        self._tuner = tuner
        self._config = tuner.peft_config[ADAPTER]
        self._allocator = tuner.rankallocator
        self._parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in tuner.model.named_parameters()
            if ".lora_" in name
        }

    @property
    def ranks(self) -> int:
        """Ranks in use, over all sites."""
        pattern = self._config.rank_pattern
        if pattern is None:
            return int(self._allocator.init_bgt)
        return sum(sum(kept) for kept in pattern.values())

    def penalise(self) -> None:
        """Adds the gradient of the orthogonality penalty to the gradients of the task loss."""
        if self._config.orth_reg_weight == 0:
            return
        vectors = {name: p for name, p in self._parameters.items() if ".lora_E." not in name}
        (self._config.orth_reg_weight * orthogonality_penalty(vectors)).backward()

    def reallocate(self, adaptation: int) -> None:
        """Measures importance and, when the schedule says so, takes ranks away.

        Args:
            adaptation: 1 for the first one; its optimizer step is done, its gradients still there.

        Raises:
            SiteError: a site never ran, so that nothing is known of its importance.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                site = name.partition(".lora_")[0]
                raise SiteError(f"site {site} never ran: leave it out of method.sites")
        last = self._config.total_step - self._config.tfinal
        if adaptation == last and not self._allocator.exp_avg_ipt:
            # A run so short that PEFT would hand out the final budget before it measured anything.
            self._allocator.update_ipt(self._tuner.model)
        self._tuner.update_and_allocate(adaptation)

    def state_dict(self) -> dict[str, Any]:
        """Running averages of importance by parameter, and which ranks are in use."""
        return {
            "importance": dict(self._allocator.exp_avg_ipt),
            "uncertainty": dict(self._allocator.exp_avg_unc),
            "rank_pattern": self._config.rank_pattern,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`."""
        importance = self._on_device(state["importance"])
        self._allocator.exp_avg_ipt = importance
        self._allocator.exp_avg_unc = self._on_device(state["uncertainty"])
        # PEFT starts its averages anew for names without a last measurement; the value is not used.
        self._allocator.ipt = dict(importance)
        self._config.rank_pattern = state["rank_pattern"]

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor.to(self._parameters[name], copy=True) for name, tensor in tensors.items()
        }


def orthogonality_penalty(vectors: Mapping[str, Tensor]) -> Tensor:
    """Mean Frobenius distance of the singular vectors' Gram matrices from the identity, a scalar.

    Paper (AdaLoRA): Eq. (4). Differs: the norm is not squared, as in the PEFT library.

    Args:
        vectors: A (R, D) and B (H, R) by name, which says `lora_A` or `lora_B`.
    """
    distances = []
    for name, parameter in vectors.items():
        gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter  # (R, R)
        distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)))
    return torch.stack(distances).mean()
