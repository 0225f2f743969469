"""The unlearning objectives by name. Nothing heavy is imported here: a mistake in a name should be said at once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "GradAscent": "grad_ascent",
        "GradDiff": "grad_diff",
        "KLMin": "kl_min",
        "NPO": "npo",
        "SimNPO": "simnpo",
        "DPO": "dpo",
        "AltPO": "alt_po",
        "IdkNLL": "idk_nll",
        "UNDIAL": "undial",
        "WGA": "wga",
        "SatImp": "sat_imp",
        "CEU": "ceu",
        "UCE": "uce",
        "IHL": "ihl",
        "FLAT": "flat",
        "RMU": "rmu",
        "PDU": "pdu",
    }
)
"""The class of each method, and its module in ``unfed.objectives``."""
WITH_ALTERNATES = ("DPO", "AltPO", "IdkNLL", "FLAT")
"""Methods that train on another answer to each forget question: a refusal, or what ``data.alternate`` holds."""
GENERATED_ALTERNATES = ("AltPO",)
"""Those of them that refusals do not serve."""
BY_EXAMPLE = ("GradAscent", "GradDiff", "NPO", "SimNPO", "WGA", "SatImp")
"""Methods whose loss, without a retain term, is a sum over examples, each by itself: what DP-SGD can clip."""
