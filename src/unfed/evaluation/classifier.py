"""How much generated answers look like clean text, by a sequence classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from unfed.base.errors import UnfedError
from unfed.metrics.stats import Array
from unfed.models.source import path_problem

GIBBERISH_DETECTOR = "madhurjindal/autonlp-Gibberish-Detector-492513457"
"""The classifier of OpenUnlearning's ``forget_Q_A_gibberish``: class 0 is clean text, 1 to 3 are kinds of gibberish."""


@torch.no_grad()
def clean_probabilities(
    texts: Sequence[str],
    path: str = GIBBERISH_DETECTOR,
    class_id: int = 0,
    batch_size: int = 32,
    max_length: int = 512,
    device: torch.device | str = "cpu",
) -> Array:
    """Probability of class ``class_id`` for each text, float64 of shape ``(len(texts),)``, in the order of ``texts``.

    As OpenUnlearning's ``classification_prob``: softmax over the classifier's logits of a text cut to ``max_length``
    tokens; an empty text is what the classifier says of its special tokens alone. Departures: texts of about one length
    share a batch, which changes no number, and a text without a single token has none (NaN) instead of an error.

    ``path`` is a directory or a hub name. Only safetensors are read and no code that comes with the model is run.
    Raises ``UnfedError`` for a classifier that cannot be opened, was never trained to classify, or lacks the class.
    """
    found = np.full(len(texts), np.nan)
    if not len(texts):
        return found
    classifier, tokenizer = _opened(path, class_id)
    classifier.to(device)
    encoded = [tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts]
    order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: len(encoded[i]))
    step = batch_size if tokenizer.pad_token_id is not None else 1
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        # By the ids, not by the text again: one tokenization decides both length and content.
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt") if step > 1 else None
        inputs = batch or {"input_ids": torch.tensor([encoded[i] for i in rows])}
        logits = classifier(**{k: v.to(device) for k, v in inputs.items()}).logits
        found[rows] = logits.float().softmax(-1)[:, class_id].double().cpu().numpy()
    return found


def _opened(path: str, class_id: int) -> tuple[nn.Module, Any]:
    if (problem := path_problem(path)) is not None:
        raise UnfedError(f"the classifier {path}: {problem}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, safetensors.SafetensorError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UnfedError(
            f"cannot open the classifier {path} (a directory or hub name, safetensors only): {first}"
        ) from e
    if info["missing_keys"]:
        raise UnfedError(
            f"the classifier {path} has no weights for {min(info['missing_keys'])}: it was not trained to classify text"
        )
    labels = classifier.config.num_labels
    if not 0 <= class_id < labels:
        raise UnfedError(f"the classifier {path} has the classes 0 to {labels - 1}, and no class {class_id}")
    return classifier.eval(), tokenizer
