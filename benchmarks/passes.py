"""TOFU's metrics the straightforward way: one pass over the data for every metric.

What it does, so that the comparison is fair: each metric runs its own ``DataLoader`` in file order, batches of 32 rows,
padded on the right; rows are tokenised in the pass; the model gives the logits of every position, which are cast to
float32 and go through a cross-entropy (or a log-softmax) over all positions. Of a column with several answers each
batch is run once for each answer. Texts are generated for each ROUGE metric, in file order, 32 prompts padded on the
left. Attacks look at forget and holdout rows, each in passes of its own; gradients are taken one row at a time.
Metrics that are numbers made of other metrics' numbers (model utility, privleak) take those.

Two ways with the rest: ``shared=False`` is one pass for each metric and nothing else, so that a truth ratio scores its
right and wrong answers itself; with ``shared=True`` losses that another named metric has computed are taken from there,
as OpenUnlearning does it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from unfed.base.types import IGNORE_INDEX, Batch, Example
from unfed.data.chat import Template, encode, encode_prompt
from unfed.data.collate import collate
from unfed.metrics import membership, overlap, probability
from unfed.metrics.stats import Array
from unfed.metrics.summary import UTILITY_PARTS
from unfed.models.decoding import left_padded

BATCH = 32
DEFAULT = ("forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility", "privleak",
           "extraction_strength")  # fmt: skip
"""The default list; without a retain model's log, forget quality is its truth ratios."""

ALL = (
    *DEFAULT,
    *(f"{s}_{k}_Prob" for s in ("forget", "retain") for k in ("Q_A_PARA", "Q_A_PERT")),
    *(f"{s}_{k}_Prob" for s in ("ra", "wf") for k in ("Q_A", "Q_A_PERT")),
    *(f"{s}_Q_A_{k}_ROUGE" for s in ("forget", "retain") for k in ("PARA", "PERT")),
    "exact_memorization", "retain_extraction_strength",
    "mia_loss", "mia_zlib", "mia_min_k_plus_plus", "mia_gradnorm",
)  # fmt: skip
"""All metrics that need no other model."""

SPLITS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
COLUMNS = {"Q_A": "answer", "Q_A_PARA": "paraphrased_answer", "Q_A_PERT": "perturbed_answer"}


@dataclass
class OnePassPerMetric:
    """Evaluates by names of metrics; ``values`` and ``texts`` (of each ROUGE metric) are what it found."""

    model: Any
    tokenizer: Any
    template: Template
    rows: Mapping[str, Sequence[Example]]
    new_tokens: int
    shared: bool = True
    values: dict[str, float] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    _losses: dict[str, list[Array]] = field(default_factory=dict)

    def evaluate(self, metrics: Sequence[str]) -> dict[str, float]:
        """Every metric's number; no names: the default list."""
        with torch.no_grad():
            for name in ALL if metrics else DEFAULT:
                self._value(name)
        return self.values

    def _value(self, name: str) -> float:
        if name not in self.values:
            self.values[name] = self._compute(name)
        return self.values[name]

    def _compute(self, name: str) -> float:
        if name == "model_utility":
            parts = [self._value(p) for p in UTILITY_PARTS]
            return len(parts) / sum(1 / p for p in parts) if all(parts) else 0.0
        if name == "privleak":
            return ((1 - self._value("mia_min_k")) - 0.5) / 0.5 * 100
        if name.startswith("mia_"):
            attack: Callable[[str], Array] = getattr(self, f"_{name}")
            return membership.auc(attack("forget"), attack("holdout"))
        if name in {"extraction_strength", "retain_extraction_strength"}:
            return float(np.mean(self._memorised("retain" if name.startswith("retain") else "forget", _strength)))
        if name == "exact_memorization":
            return float(np.mean(self._memorised("forget", np.mean)))
        short, _, kind = name.partition("_")
        if kind.endswith("ROUGE"):
            return self._rouge(name, SPLITS[short], COLUMNS[kind.removesuffix("_ROUGE")])
        return self._of_losses(short, kind)

    def _of_losses(self, short: str, kind: str) -> float:
        """Probabilities, and what is made of two of them."""
        whole = short in {"ra", "wf"}
        if kind.lower() == "truth_ratio":
            right = self._prob(f"{short}_{'Q_A' if whole else 'Q_A_PARA'}_Prob")
            wrong = self._prob(f"{short}_Q_A_PERT_Prob")
            ratios = probability.truth_ratio(np.concatenate(right), wrong)
            aggregate = probability.closer_to_1_better if short == "forget" else probability.true_better
            return float(aggregate(ratios).mean())
        if kind == "Q_A_Prob_normalised":
            right, wrong = self._prob(f"{short}_Q_A_Prob"), self._prob(f"{short}_Q_A_PERT_Prob")
            return float(probability.normalised_prob(np.concatenate(right), wrong).mean())
        self._prob(f"{short}_{kind}")
        return self.values[f"{short}_{kind}"]

    def _prob(self, name: str) -> list[Array]:
        """Losses of each row's answers; where results are shared, computed once for a name."""
        if not self.shared or name not in self._losses:
            short, _, kind = name.partition("_")
            split, column = SPLITS[short], COLUMNS[kind.removesuffix("_Prob")]
            self._losses[name] = self._pass(split, column, _mean_losses)
            self.values[name] = float(np.mean([np.exp(-row).mean() for row in self._losses[name]]))
        return self._losses[name]

    def _batches(self, split: str) -> Iterator[list[Example]]:
        rows: Any = self.rows[split]
        return iter(DataLoader(rows, batch_size=BATCH, shuffle=False, collate_fn=list))

    def _pass(self, split: str, column: str, measure: Callable[[Tensor, Batch], list[Any]]) -> list[Any]:
        """``measure(logits, batch)`` for each answer; by row, an array of its answers' numbers."""
        found: list[Any] = []
        for rows in self._batches(split):
            answers = [r[column] if isinstance(r[column], list) else [r[column]] for r in rows]
            own: list[list[Any]] = [[] for _ in rows]
            for number in range(max(len(a) for a in answers)):
                there = [i for i, a in enumerate(answers) if number < len(a)]
                batch = self._collated([(rows[i]["question"], answers[i][number]) for i in there])
                logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                for i, value in zip(there, measure(logits, batch), strict=True):
                    own[i].append(value)
            found += [np.array(values) if np.isscalar(values[0]) else values[0] for values in own]
        return found

    def _collated(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        return collate([encode(self.tokenizer, self.template, q, a) for q, a in pairs], self.tokenizer.pad_token_id)

    def _memorised(self, split: str, measure: Callable[[Array], Any]) -> list[Any]:
        return [measure(hits) for hits in self._pass(split, "answer", _hits)]

    def _rouge(self, name: str, split: str, column: str) -> float:
        self.texts[name] = [text for rows in self._batches(split) for text in self._generate(rows)]
        answers = [r[column] if isinstance(r[column], list) else [r[column]] for r in self.rows[split]]
        each = [
            np.mean([overlap.rouge(a, text)["rougeL_recall"] for a in own])
            for own, text in zip(answers, self.texts[name], strict=True)
        ]
        return float(np.mean(each))

    def _generate(self, rows: Sequence[Example]) -> list[str]:
        prompts = [encode_prompt(self.tokenizer, self.template, r["question"]) for r in rows]
        ids, mask = left_padded(prompts, self.tokenizer.pad_token_id)
        config = GenerationConfig(max_new_tokens=self.new_tokens, do_sample=False, use_cache=True,
                                  pad_token_id=self.tokenizer.pad_token_id,
                                  eos_token_id=self.tokenizer.eos_token_id)  # fmt: skip
        out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _mia_loss(self, split: str) -> Array:
        return np.concatenate(self._pass(split, "answer", _mean_losses))

    def _mia_zlib(self, split: str) -> Array:
        sizes = [len(zlib.compress(r["answer"].encode())) for r in self.rows[split]]
        return np.concatenate(self._pass(split, "answer", _mean_losses)) / np.array(sizes)

    def _mia_min_k(self, split: str) -> Array:
        return np.array([_lowest(v) for v in self._pass(split, "answer", _token_logps)])

    def _mia_min_k_plus_plus(self, split: str) -> Array:
        return np.array([_lowest(v) for v in self._pass(split, "answer", _standardised)])

    def _mia_gradnorm(self, split: str) -> Array:
        found = []
        for row in self.rows[split]:
            batch = self._collated([(row["question"], row["answer"])])
            with torch.enable_grad():
                logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                loss = _cross_entropy(logits, batch)[0, batch.labels[0, 1:] != IGNORE_INDEX][:-1].mean()
                grads = torch.autograd.grad(loss, list(self.model.parameters()))
            found.append(float(torch.stack([g.norm() for g in grads]).mean()))
        return np.array(found)


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Losses of all positions, ``(B, T - 1)``."""
    shifted = logits[:, :-1].float().transpose(1, 2)
    return F.cross_entropy(shifted, batch.labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none")


def _mean_losses(logits: Tensor, batch: Batch) -> list[float]:
    return (_cross_entropy(logits, batch).sum(dim=1) / batch.num_label_tokens).tolist()


def _labelled(values: Tensor, batch: Batch) -> list[Array]:
    """By row the values ``(B, T - 1)`` of the labelled tokens but the last."""
    mask = batch.labels[:, 1:] != IGNORE_INDEX
    return [row[own].numpy()[:-1] for row, own in zip(values, mask, strict=True)]


def _gathered(logps: Tensor, batch: Batch) -> Tensor:
    return logps.gather(2, batch.labels[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)


def _token_logps(logits: Tensor, batch: Batch) -> list[Array]:
    return _labelled(_gathered(logits[:, :-1].float().log_softmax(dim=2), batch), batch)


def _standardised(logits: Tensor, batch: Batch) -> list[Array]:
    logps = logits[:, :-1].float().log_softmax(dim=2)
    mean = (logps.exp() * logps).sum(dim=2)
    var = (logps.exp() * (logps - mean.unsqueeze(2)).square()).sum(dim=2)
    return _labelled((_gathered(logps, batch) - mean) / var.clamp(min=1e-6).sqrt(), batch)


def _hits(logits: Tensor, batch: Batch) -> list[Array]:
    logps = logits[:, :-1].float().log_softmax(dim=2)
    return _labelled(logps.argmax(dim=2) == batch.labels[:, 1:], batch)


def _strength(hits: Array) -> float:
    misses = np.flatnonzero(~hits)
    k = min(int(misses[-1]) + 1, len(hits) - 1) if len(misses) else 0
    return 1 - k / len(hits)


def _lowest(values: Array) -> float:
    k = max(1, int(membership.MIN_K * len(values)))
    return -float(np.sort(values)[:k].mean())
