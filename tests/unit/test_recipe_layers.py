"""Which layers a recipe works on."""

from __future__ import annotations

import pytest
import torch

from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState
from unfed.unlearning.layers import LayersRule, change, chosen_modules
from unfed.unlearning.registry import recipe_problems

SIZES = {"model.layers.2.q": 3.0, "model.layers.10.q": 4.0, "model.layers.2.v": 4.0, "lm_head": 1.0}
"""``||s B A||`` of each module: layer 2 has 5 in all, layer 10 has 4, the head 1."""
PREFIX = "base_model.model."
SCALING = {PREFIX + m: 2.0 for m in SIZES}


def adapter() -> AdapterState:
    """``A`` a row of unit length, ``B`` a column of length ``size / s``."""
    tensors = {}
    for module, size in SIZES.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.tensor([[0.6, 0.8]])
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.tensor([[0.0], [size / 2.0], [0.0]])
    return AdapterState(tensors)


def test_a_layer_changed_as_much_as_all_its_modules():
    found = {k.removeprefix(PREFIX): v for k, v in change(adapter(), SCALING).items()}
    assert found == pytest.approx({"model.layers.2": 5.0, "model.layers.10": 4.0, "lm_head": 1.0})


@pytest.mark.parametrize(
    ("which", "modules"),
    [
        ("all", ["model.layers.2.q", "model.layers.2.v", "model.layers.10.q", "lm_head"]),
        ("first", ["model.layers.2.q", "model.layers.2.v"]),
        (0.1, ["model.layers.2.q", "model.layers.2.v"]),
        (0.5, ["model.layers.2.q", "model.layers.2.v", "model.layers.10.q"]),
        (1, ["model.layers.2.q", "model.layers.2.v", "model.layers.10.q", "lm_head"]),
        (r"layers\.10\.|head", ["model.layers.10.q", "lm_head"]),
    ],
)
def test_choices(which, modules):
    assert chosen_modules(which, adapter(), SCALING) == tuple(PREFIX + m for m in modules)


def test_a_pattern_that_fits_nothing_names_what_there_is():
    with pytest.raises(
        AdapterError, match=r"recipe.layers=k_proj: no module .* \(they are model.layers.2.q to lm_head"
    ):
        chosen_modules("k_proj", adapter(), SCALING)


@pytest.mark.parametrize("value", [0, 1.5, -1, True, None, "", "(", ["all"]])
def test_what_is_no_choice(value):
    complaint = LayersRule().complaint(value)
    assert complaint is not None and complaint.startswith("must be all, first, a number")


def test_the_rank_is_a_whole_number():
    (problem,) = recipe_problems("unlearning_adapter", {"r": 2.5})
    assert problem == "recipe.r: must be a whole number at least 1, not 2.5"
    assert recipe_problems("unlearning_adapter", {"r": 4, "layers": 0.5, "forget": "none"}) == []
