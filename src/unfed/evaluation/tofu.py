"""The TOFU suite (2401.06121) with the metrics that OpenUnlearning (2506.12618) has beside TOFU's own, by its names."""

from __future__ import annotations

from unfed.evaluation import attacks as mia
from unfed.evaluation.attacks import Attack, Privacy, PrivLeak
from unfed.evaluation.combined import (
    Fluency,
    ForgetQuality,
    Gibberish,
    Memorisation,
    ModelUtility,
    Overall,
    RelativeUtility,
)
from unfed.evaluation.metric import Metric, Suite
from unfed.evaluation.rules import Memorised, NormalisedProb, Prob, Rouge, TruthRatio
from unfed.metrics import memorization, probability


def _forget() -> list[Metric]:
    return [
        Metric("forget_Q_A_Prob", Prob("forget"), False),
        Metric("forget_Q_A_PARA_Prob", Prob("forget", "paraphrased_answer"), False),
        Metric("forget_Q_A_PERT_Prob", Prob("forget", "perturbed_answer")),
        Metric("forget_Q_A_ROUGE", Rouge("forget"), False),
        Metric("forget_Q_A_PARA_ROUGE", Rouge("forget", "paraphrased_answer"), False),
        Metric("forget_Q_A_PERT_ROUGE", Rouge("forget", "perturbed_answer")),
        Metric(
            "forget_truth_ratio",
            TruthRatio("forget", "paraphrased_answer", aggregate=probability.closer_to_1_better),
            True,
        ),
        Metric("forget_quality", ForgetQuality(), True),
        Metric("extraction_strength", Memorised(memorization.extraction_strength_score), False),
        Metric("exact_memorization", Memorised(memorization.exact_memorization_score), False),
        Metric("forget_fluency", Fluency("forget"), True),
        Metric("forget_Q_A_gibberish", Gibberish("forget"), True),
    ]


def _kept() -> list[Metric]:
    found = [
        Metric("retain_Q_A_Prob", Prob("retain"), True),
        Metric("retain_Q_A_PARA_Prob", Prob("retain", "paraphrased_answer"), True),
        Metric("retain_Q_A_PERT_Prob", Prob("retain", "perturbed_answer"), False),
        Metric("retain_Q_A_ROUGE", Rouge("retain"), True),
        Metric("retain_Q_A_PARA_ROUGE", Rouge("retain", "paraphrased_answer"), True),
        Metric("retain_Q_A_PERT_ROUGE", Rouge("retain", "perturbed_answer"), False),
        Metric("retain_extraction_strength", Memorised(memorization.extraction_strength_score, "retain"), True),
        Metric("retain_Truth_Ratio", TruthRatio("retain", "paraphrased_answer"), True),
    ]
    for short, split in (("ra", "real_authors"), ("wf", "world_facts")):
        found += [
            Metric(f"{short}_Q_A_Prob", Prob(split), True),
            Metric(f"{short}_Q_A_PERT_Prob", Prob(split, "perturbed_answer"), False),
            Metric(f"{short}_Q_A_Prob_normalised", NormalisedProb(split), True),
            Metric(f"{short}_Q_A_ROUGE", Rouge(split), True),
            Metric(f"{short}_Truth_Ratio", TruthRatio(split), True),
        ]
    return [*found, Metric("model_utility", ModelUtility(), True)]


def membership() -> list[Metric]:
    """The six membership attacks and what is made of them; MUSE has them too."""
    return [
        Metric("mia_loss", Attack(mia.loss_attack)),
        Metric("mia_zlib", Attack(mia.zlib_attack)),
        Metric("mia_min_k", Attack(mia.min_k_attack)),
        Metric("mia_min_k_plus_plus", Attack(mia.min_k_plus_plus_attack, "details")),
        Metric("mia_reference", Attack(mia.reference_attack, "reference")),
        Metric("mia_gradnorm", Attack(mia.gradnorm_attack, "gradients")),
        Metric("privleak", PrivLeak()),
        Metric("priv", Privacy(), True),
    ]


def _summaries() -> list[Metric]:
    return [
        Metric("mem", Memorisation("forget", "paraphrased_answer"), True),
        Metric("utility", RelativeUtility(), True),
        Metric("agg", Overall(), True),
    ]


TOFU = Suite(
    title="TOFU",
    metrics={m.name: m for m in (*_forget(), *_kept(), *membership(), *_summaries())},
    default=(
        "forget_quality", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility", "privleak", "extraction_strength",
    ),
)  # fmt: skip
