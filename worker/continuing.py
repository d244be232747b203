"""Going on with an adapter that was made before: what it must share with the training, and its weights taken over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker import models
from worker.failures import ConfigFailure

if TYPE_CHECKING:
    from worker.lora import Learner

_PLAIN: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}
"""Settings of an adapter that ours does not have: with another value the same weights would mean another model."""


def check(params: dict[str, Any], request: models.ModelRequest) -> None:
    """Raise ConfigFailure for an adapter that was made for another base, or in another form than is asked for.

    Of a base without weights here, as the built-in model's in a dry run, the digest is not compared.
    """
    adapter = str(request.adapter)
    folder = Path(request.model)
    if not folder.is_dir() or any(list(folder.glob(pattern)) for pattern in models.WEIGHT_PATTERNS):
        models.check_base(request)
    config = _config(adapter)
    wanted = {"peft_type": "LORA", "r": params["rank"], "lora_alpha": params["alpha"], **_PLAIN}
    for name, value in wanted.items():
        if (found := config.get(name)) != value and (found or value):
            raise _misfit(adapter, f"its {name} is {found}, and this training's {value}", _as_it_is(config))
    asked, made = params["targets"], config.get("target_modules")
    if asked != "all-linear" and isinstance(made, (list, set, tuple)) and _names(asked) != set(made):
        raise _misfit(adapter, f"it is for {','.join(sorted(made))}, and this training for {asked}", _as_it_is(config))


def take_over(learner: Learner, adapter: str) -> None:
    """Have the adapter's weights in place of new ones; ConfigFailure unless each has its place and size."""
    import torch
    from peft import load_peft_weights

    found = load_peft_weights(adapter, device="cpu")
    wanted = {name.replace(".default.", "."): each for name, each in learner.weights.items()}
    for name in sorted({**found, **wanted}):
        sizes = [tuple(side[name].shape) if name in side else None for side in (found, wanted)]
        if sizes[0] != sizes[1]:
            words = f"{name} has the size {sizes[0]} in it, and {sizes[1]} in this training"
            raise _misfit(adapter, words, _as_it_is(_config(adapter)))
    with torch.no_grad():
        for name, each in wanted.items():
            each.copy_(found[name])
    learner.begun = {name: each.detach().cpu().clone() for name, each in learner.weights.items() if "lora_B" in name}


def _config(adapter: str) -> dict[str, Any]:
    """The adapter's settings as peft reads them, from a folder or the Hub."""
    from peft import PeftConfig

    with models.explained(models.ModelRequest(adapter), "adapter"):
        config: dict[str, Any] = PeftConfig.from_pretrained(adapter).to_dict()
    return {**config, "peft_type": str(config["peft_type"]).rpartition(".")[2]}


def _names(targets: str) -> set[str]:
    return {word.strip() for word in targets.split(",") if word.strip()}


def _as_it_is(config: dict[str, Any]) -> str:
    """What to type so that the training has the adapter's form."""
    made = config.get("target_modules")
    targets = ",".join(sorted(made)) if isinstance(made, (list, set, tuple)) else made
    form = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "targets": targets}
    return " ".join(f"--set {name}={value}" for name, value in form.items() if value is not None)


def _misfit(adapter: str, why: str, hint: str) -> ConfigFailure:
    return ConfigFailure(f"adapter={adapter} cannot be gone on with: {why}. Nothing was trained.", hint)
