"""Alternate preference optimization: DPO on plausible other answers that the model wrote itself."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.objectives.dpo import DPO


@dataclass(frozen=True)
class AltPO(DPO):
    """DPO's loss with generated alternate answers, plus a retain term (Mekala et al. 2025, "Alternate Preference
    Optimization for Unlearning Factual Knowledge in Large Language Models"; the ``2/beta`` is the authors').

    What sets it apart from DPO is the data: answers from ``data.alternate``, without which it is refused
    (``unfed alternates`` writes them). Defaults as in the authors' code: ``beta`` 0.1, both terms of weight 1.
    Departure: where a question has several alternates, each epoch draws one of them; OpenUnlearning makes a pair of
    each.
    """
