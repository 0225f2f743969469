"""Probabilities of a sequence classifier against one text at a time, softmax by hand."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from unfed.base.errors import UnfedError
from unfed.evaluation.classifier import clean_probabilities

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "boat", "in", "rome", "sells", "zzz", "qq"]
TEXTS = ["the boat in rome", "", "zzz qq zzz qq zzz qq zzz", "a boat sells", "unheard", "the " * 40]


def make_tokenizer(directory, *, special=True):
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]"}
    if special:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(directory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, num_labels=4, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def by_hand(directory, text, class_id, max_length):
    """[CLS] words [SEP], cut so that [SEP] stays last; exp(logit) over the sum of all, one text at a time."""
    words = [WORDS.index(w) if w in WORDS else 1 for w in text.split()]
    ids = [2, *words[: max_length - 2], 3]
    model = BertForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = [float(x) for x in model(input_ids=torch.tensor([ids])).logits[0]]
    return math.exp(logits[class_id]) / sum(math.exp(x) for x in logits)


@pytest.mark.parametrize(("batch_size", "class_id", "max_length"), [(32, 0, 60), (2, 0, 60), (3, 2, 5), (1, 3, 60)])
def test_a_text_has_the_softmax_of_its_own_logits(classifier, batch_size, class_id, max_length):
    found = clean_probabilities(TEXTS, str(classifier), class_id, batch_size, max_length)
    expected = [by_hand(classifier, t, class_id, max_length) for t in TEXTS]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.ptp(expected) > 0.05  # the texts differ, so a wrong order would show


def test_truncation_matters_and_all_classes_add_up(classifier):
    (short,), (long,) = (clean_probabilities([TEXTS[-1]], str(classifier), max_length=n) for n in (4, 40))
    assert abs(short - long) > 1e-4
    total = sum(clean_probabilities(TEXTS, str(classifier), c, max_length=60) for c in range(4))
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_no_texts_and_a_text_without_a_token(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=32, num_labels=3)
    model = GPT2ForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    make_tokenizer(tmp_path, special=False)  # no padding either: one text at a time
    assert clean_probabilities([], str(tmp_path)).shape == (0,)
    found = clean_probabilities(["", "a boat", "zzz"], str(tmp_path))
    assert np.isnan(found[0])
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[5, 6]])).logits[0].double().numpy()
    assert found[1] == pytest.approx(np.exp(logits[0]) / np.exp(logits).sum(), abs=1e-6)
    assert found[1] != found[2]


def test_what_is_no_classifier_is_refused(classifier, small_base, tmp_path):
    with pytest.raises(UnfedError, match=r"has the classes 0 to 3, and no class 4"):
        clean_probabilities(["a"], str(classifier), 4)
    with pytest.raises(UnfedError, match=r"there is no .*/nowhere"):
        clean_probabilities(["a"], str(tmp_path / "nowhere"))
    # A language model would get a random head, and random scores.
    with pytest.raises(UnfedError, match=r"no weights for score.weight: it was not trained to classify"):
        clean_probabilities(["a"], str(small_base))


def test_a_pickled_classifier_is_not_opened(small_base, tmp_path):
    model = LlamaForSequenceClassification.from_pretrained(small_base)
    model.config.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnfedError, match=r"safetensors only"):
        clean_probabilities(["a"], str(tmp_path))
