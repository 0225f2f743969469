"""The MUSE suite (2407.06460), on News or Books: what is left of texts and of the knowledge in them.

Names are OpenUnlearning's (d3d7cf9). ROUGE is rougeL F1 there and in MUSE, where TOFU takes the recall. Of a text that
is continued, memorisation metrics drop the last token as they do of an answer.
"""

from __future__ import annotations

from unfed.evaluation.combined import Fluency, Gibberish
from unfed.evaluation.metric import Metric, Suite
from unfed.evaluation.rules import Memorised, Rouge
from unfed.evaluation.tofu import membership
from unfed.metrics import memorization


def _muse() -> list[Metric]:
    return [
        Metric("forget_verbmem_ROUGE", Rouge("verbmem", kind="rougeL_f1"), False),
        Metric("forget_knowmem_ROUGE", Rouge("forget_qa", kind="rougeL_f1"), False),
        Metric("retain_knowmem_ROUGE", Rouge("retain_qa", kind="rougeL_f1"), True),
        Metric("extraction_strength", Memorised(memorization.extraction_strength_score, "verbmem"), False),
        Metric("exact_memorization", Memorised(memorization.exact_memorization_score, "verbmem"), False),
        Metric("forget_fluency", Fluency("verbmem"), True),
        Metric("forget_gibberish", Gibberish("verbmem"), True),
        *membership(),
    ]


MUSE = Suite(
    title="MUSE",
    metrics={m.name: m for m in _muse()},
    default=(
        "forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "privleak", "extraction_strength",
    ),
)  # fmt: skip
