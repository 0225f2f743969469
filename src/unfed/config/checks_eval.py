"""What types cannot say of an evaluation's settings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unfed.config.schema import EvalConfig, RunConfig
from unfed.config.schema_eval import RobustnessConfig
from unfed.evaluation.lm_tasks import limit_problems

USUAL = EvalConfig()
BITS = (8, 4)
NEED_A_LOG = ("forget_quality", "privleak", "priv", "utility", "agg")


def metric_names(given: EvalConfig) -> list[str]:
    """A message for each metric that the suite does not have. Only names that were given are looked at: that takes the
    suite, whose import takes seconds."""
    named = {
        "eval.metrics": given.metrics,
        "eval.round_metrics": () if given.round_metrics == USUAL.round_metrics else given.round_metrics,
        "eval.robustness.metrics": given.robustness.metrics if given.robustness else (),
    }
    if given.suite == "lm_eval":
        return [f"{key}: suite lm_eval takes its metrics from the tasks; leave it out" for key in named if named[key]]
    if not any(named.values()):
        return []
    from unfed.evaluation.suites import SUITES

    return [problem for key, names in named.items() for problem in SUITES[given.suite].unknown(names, key)]


def evaluation_settings(config: RunConfig) -> Iterator[str]:
    """Numbers out of their limits, and settings that do not go together."""
    strategy = config.trainer.args.get("eval_strategy", "no") if config.trainer else "no"
    usable = config.eval is not None and config.eval.enabled and config.eval.suite != "lm_eval"
    if strategy in ("round", "phase") and not usable:
        yield f"trainer.args.eval_strategy={strategy}: needs an evaluation that is switched on (eval=tofu or eval=muse)"
    elif strategy in ("round", "phase"):
        assert config.eval is not None
        yield from _between_rounds(config.eval)
    if config.eval is None:
        if config.mode == "eval":
            yield "eval: mode eval needs a suite; give eval=tofu"
        return
    e = config.eval
    if config.mode == "eval" and not e.enabled:
        yield "eval.enabled=false: mode eval has nothing else to do"
    if not 0 < e.generation.temperature < math.inf:
        yield f"eval.generation.temperature={e.generation.temperature}: must be above 0 (do_sample=false is greedy)"
    if not 0 < e.generation.top_p <= 1:
        yield f"eval.generation.top_p={e.generation.top_p}: must be above 0 and at most 1"
    if e.suite == "lm_eval":
        yield from limit_problems(e.lm_eval)
    numbers = {"batch_size": e.batch_size, "max_tokens": e.max_tokens, "max_length": e.max_length, "limit": e.limit}
    numbers |= {"generation.max_new_tokens": e.generation.max_new_tokens, "round_limit": e.round_limit}
    yield from (f"eval.{n}={v}: must be at least 1" for n, v in numbers.items() if v is not None and v < 1)
    if e.robustness is not None:
        yield from _robustness(config, e.robustness)


def _between_rounds(given: EvalConfig) -> Iterator[str]:
    if not given.round_metrics:
        yield "eval.round_metrics: names no metric; trainer.args.eval_strategy=no switches the evaluations off"
    yield from (
        f"eval.round_metrics: {n} compares with another model's log, which evaluations between rounds do not read; "
        "leave it out"
        for n in given.round_metrics
        if n in NEED_A_LOG and n != "privleak"  # which then compares with 0.5, and says so
    )


def _robustness(config: RunConfig, given: RobustnessConfig) -> Iterator[str]:
    key = "eval.robustness"
    if config.mode != "eval":
        yield f"{key}: the checks are made on a finished model; take src/eval.py experiment=eval/robustness"
    if config.eval is not None and config.eval.suite != "tofu":
        yield f"{key}: the checks ask TOFU's metrics, and eval.suite={config.eval.suite}; take eval=tofu"
    if not given.metrics:
        yield f"{key}.metrics: names no metric"
    yield from (
        f"{key}.metrics: {n} compares with a retain model's log, which the checks do not read; leave it out"
        for n in given.metrics
        if n in NEED_A_LOG
    )
    wrong = [b for b in given.quantize if b not in BITS]
    if wrong or len(set(given.quantize)) < len(given.quantize):
        yield f"{key}.quantize={list(given.quantize)}: must be bits out of {list(BITS)}, each once"
    if given.group_size is not None and given.group_size < 1:
        yield f"{key}.group_size={given.group_size}: must be at least 1, or null for whole rows"
    if any(not p.strip() for p in given.prefix):
        yield f"{key}.prefix={list(given.prefix)}: a beginning must not be blank; [] switches the check off"
    yield from _relearning_and_sampling(key, given)


def _relearning_and_sampling(key: str, given: RobustnessConfig) -> Iterator[str]:
    if (r := given.relearn) is not None:
        rules = {"learning_rate": 1.0 if r.learning_rate is None else r.learning_rate, "epochs": r.epochs}
        yield from (
            f"{key}.relearn.{n}={v}: must be above 0, and finite" for n, v in rules.items() if not 0 < v < math.inf
        )
        if r.batch_size < 1:
            yield f"{key}.relearn.batch_size={r.batch_size}: must be at least 1"
    elif given.oracle_path is not None:
        yield f"{key}.oracle_path={given.oracle_path}: is for relearning, which is switched off"
    if (b := given.best_of) is not None:
        if b.n < 1:
            yield f"{key}.best_of.n={b.n}: must be at least 1"
        if not 0 < b.temperature < math.inf:
            yield f"{key}.best_of.temperature={b.temperature}: must be above 0, and finite"
        yield from (
            f"{key}.best_of.{n}={v}: must be above 0 and at most 1"
            for n, v in {"top_p": b.top_p, "threshold": b.threshold}.items()
            if not 0 < v <= 1
        )
