"""The evaluation's part of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unfed.base.params import STRICT
from unfed.evaluation.lm_tasks import LmEvalArgs


@dataclass(frozen=True)
class GenerationConfig:
    __pydantic_config__: ClassVar[Any] = STRICT
    max_new_tokens: int = 200
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class RelearnConfig:
    """Plain fine-tuning on the forget rows. ``learning_rate=None``: OpenUnlearning's 2e-5, of an adapter 2e-4."""

    __pydantic_config__: ClassVar[Any] = STRICT
    learning_rate: float | None = None
    epochs: float = 1.0
    batch_size: int = 8


@dataclass(frozen=True)
class BestOfConfig:
    """``n`` sampled answers to each forget question; a best one with ROUGE ``threshold`` or more is a leak."""

    __pydantic_config__: ClassVar[Any] = STRICT
    n: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    threshold: float = 0.5


@dataclass(frozen=True)
class RobustnessConfig:
    """Attempts to bring back what was forgotten, each measured by ``metrics``.

    ``null``, ``false`` or an empty list switches a check off. ``oracle_path``: the retain model, relearned in the same
    way. ``quantize``: bits; ``group_size``: input columns that share a scale at 4 bit (none: the whole row).
    ``quantizer``: ``auto`` is bitsandbytes on a GPU where it is installed, else a simulation of our own.
    ``prefix``: beginnings of the answer. ``add_adapter``: an adapter directory whose update is added.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    metrics: tuple[str, ...] = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength")
    relearn: RelearnConfig | None = RelearnConfig()
    oracle_path: str | None = None
    quantize: tuple[int, ...] = (8, 4)
    group_size: int | None = None
    quantizer: Literal["auto", "round_to_nearest", "bitsandbytes"] = "auto"
    paraphrase: bool = True
    prefix: tuple[str, ...] = ("Sure, here is the answer:",)
    best_of: BestOfConfig | None = BestOfConfig()
    merge: bool = True
    add_adapter: str | None = None


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation suite. ``metrics``: names of ``TOFU_SUMMARY.json``; ``limit`` keeps the first rows of
    each split. Without ``holdout_split``, forget10 goes with holdout10, and so on. ``max_tokens`` is the token
    budget of a batch; ``batch_size`` bounds its rows. ``round_metrics`` and ``round_limit`` are for the evaluations
    between rounds (``trainer.args.eval_strategy``). ``cache_dir``: what models said is kept there (none: not kept).
    Suite ``lm_eval`` reads ``lm_eval`` alone."""

    __pydantic_config__: ClassVar[Any] = STRICT
    suite: Literal["tofu", "muse", "lm_eval"] = "tofu"
    enabled: bool = True
    path: str = "locuslab/TOFU"
    forget_split: str = "forget10"
    holdout_split: str | None = None
    retain_logs_path: str | None = None
    finetuned_logs_path: str | None = None
    reference_model_path: str | None = None
    gibberish_model: str | None = None
    metrics: tuple[str, ...] = ()
    round_metrics: tuple[str, ...] = ("forget_Q_A_Prob", "retain_Q_A_Prob")
    round_limit: int | None = 64
    cache_dir: str | None = None
    batch_size: int = 32
    max_tokens: int = 4096
    max_length: int = 512
    limit: int | None = None
    parity: Literal["openunlearning"] | None = None
    generation: GenerationConfig = GenerationConfig()
    lm_eval: LmEvalArgs = LmEvalArgs()
    robustness: RobustnessConfig | None = None
