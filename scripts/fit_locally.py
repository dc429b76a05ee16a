"""Fits one user's adapters outside of a run, in a process of the user's own.

    python scripts/fit_locally.py RUN/local/USER --optimizer adagrad --lr 0.01

Needs torch and safetensors, nothing else: copy the file to wherever it is to run, and change it. It
waits in the folder for the run's rounds, answers each one, and ends when the run says so. How it
fits is the user's own affair: here any optimizer of the table below, on Eq. (6) of the paper.
`docs/local-fitting.md` describes the folder.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

FORMAT_VERSION = 1
POLL_SECONDS = 0.02
REPLIES = ("reply.safetensors", "reply.error")

Build = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "adagrad": torch.optim.Adagrad,
    "rprop": torch.optim.Rprop,
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe"),
    "sgd": torch.optim.SGD,
}


class LocalFit:
    """A user's adapters and one optimizer for each, whose state lasts from round to round."""

    def __init__(self, description: dict[str, Any], build: Build) -> None:
        """`description` is `adapters.json`."""
        if description["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {description['format_version']}, not {FORMAT_VERSION}")
        self._alpha = description["alpha"]
        self._sites = description["adapters"]
        self._build = build
        self._parameters: dict[str, dict[str, Tensor]] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def answer(self, data: dict[str, Tensor], rate: float, steps: int) -> dict[str, Tensor]:
        """New parameters, `<site>/<parameter>`, from the tensors of one round."""
        for site, described in self._sites.items():
            self._install(site, data)
            if f"{site}/hidden_input" not in data:  # no row passed the site: nothing to learn
                continue
            optimizer = self._optimizers[site]
            for group in optimizer.param_groups:
                group["lr"] = rate * described["learning_rate_factor"]
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()  # its curvature is that of the last round's data
            closure = self._loss(site, data)
            for _ in range(steps):
                optimizer.step(closure)
        own = self._parameters
        return {f"{s}/{name}": p.detach() for s, named in own.items() for name, p in named.items()}

    def _install(self, site: str, data: dict[str, Tensor]) -> None:
        """The run's parameters, in the tensors that the optimizer knows."""
        sent = {name: data[f"{site}/adapter/{name}"] for name in self._sites[site]["shapes"]}
        if site not in self._parameters:
            self._parameters[site] = {n: t.clone().requires_grad_() for n, t in sent.items()}
            self._optimizers[site] = self._build(list(self._parameters[site].values()))
        for name, tensor in sent.items():
            self._parameters[site][name].data.copy_(tensor)

    def _loss(self, site: str, data: dict[str, Tensor]) -> Callable[[], float]:
        """Half the squared distance to "output - gradient", formed so that no digit is lost."""
        described, own = self._sites[site], self._parameters[site]
        x, gradient = data[f"{site}/hidden_input"], data[f"{site}/hidden_gradient"]
        before = output(described, own, x).detach()

        def closure() -> float:
            self._optimizers[site].zero_grad()
            moved = self._alpha * (output(described, own, x) - before)
            loss = 0.5 * (moved + gradient).square().sum()
            loss.backward()
            return float(loss.detach())

        return closure


def output(described: dict[str, Any], own: dict[str, Tensor], x: Tensor) -> Tensor:
    """g(x) of one adapter: rows (N, D) to (N, H), or images (N, D, h, w) to (N, H, h', w')."""
    is_image = described["site_kind"] == "conv2d"
    geometry = {k: described[k] for k in ("stride", "padding", "dilation")} if is_image else {}
    site_map = functional.conv2d if is_image else functional.linear
    if described["kind"] == "lowrank":
        down = site_map(x, own["lora_a"], **geometry)
        return functional.conv2d(down, own["lora_b"]) if is_image else down @ own["lora_b"].T
    if described["kind"] == "linear":
        return site_map(x, own["weight"], own.get("bias"), **geometry)
    if is_image:  # an MLP acts on every pixel that the site's stride keeps
        x = x[:, :, :: geometry["stride"][0], :: geometry["stride"][1]].movedim(1, -1)
    depth = len(own) // 2
    for layer in range(depth):
        x = functional.linear(x, own[f"layers.{layer}.weight"], own[f"layers.{layer}.bias"])
        x = x.relu() if layer < depth - 1 else x
    return x.movedim(-1, 1) if is_image else x


def serve(folder: Path, build: Build, *, lr: float | None = None, steps: int = 1) -> None:
    """Answers rounds until the run is done; `lr` replaces the run's learning rate."""
    fit, text = None, ""
    while not (folder / "done").exists():
        rounds = sorted(folder.glob("round-*"))
        here = next((r for r in rounds if not any((r / name).exists() for name in REPLIES)), None)
        if here is None:
            time.sleep(POLL_SECONDS)
            continue
        draft = here / "reply.partial"  # renamed when complete: the run may look at any moment
        try:
            facts = json.loads((here / "round.json").read_text(encoding="utf-8"))
            described = (folder / "adapters.json").read_text(encoding="utf-8")
            if fit is None or described != text:
                fit, text = LocalFit(json.loads(described), build), described
            data = load_file(here / "data.safetensors")
            found = fit.answer(data, lr or facts["learning_rate"], steps)
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, draft)
            draft.rename(here / REPLIES[0])
        except Exception as error:
            with contextlib.suppress(FileNotFoundError):  # the run has taken the round back
                draft.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                draft.rename(here / REPLIES[1])


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="RUN/local/USER, or users.local_dir/USER")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adagrad")
    parser.add_argument("--lr", type=float, help="learning rate; as the run's if left out")
    parser.add_argument("--steps", type=int, default=1, help="of the optimizer in every round")
    parser.add_argument("--threads", type=int, default=1, help="cores; the run needs some, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"waiting for rounds in {given.folder}", flush=True)
    serve(given.folder, OPTIMIZERS[given.optimizer], lr=given.lr, steps=given.steps)
    print((given.folder / "done").read_text(encoding="utf-8").strip())


if __name__ == "__main__":
    main()
