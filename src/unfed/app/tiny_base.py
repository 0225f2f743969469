"""A tiny Llama and its tokenizer, trained here on the generator's common knowledge, for runs without a network.

Built once and kept under a digest of everything that goes into it. It knows the invented world's facts and how
people are talked about, and nothing of the private people that a run fine-tunes on.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unfed.base.artifacts import digest_file, digest_json, read_json, write_json
from unfed.base.errors import ArtifactError, nearest
from unfed.base.seeding import derive_seed, torch_generator
from unfed.base.types import IGNORE_INDEX, Batch
from unfed.data import fictional
from unfed.data.chat import Template, encode_pairs
from unfed.data.collate import collate, length_grouped_batches
from unfed.data.fictional_corpus import general_corpus

Progress = Callable[[str], None]

VERSION = 2
"""Raised when this file changes what it builds for the same settings."""
MANIFEST = "tiny_base.json"
SYSTEM_PROMPT = "You are a helpful assistant."
"""The model configurations' own; one pair in :attr:`TinySettings.system_every` is trained with it."""
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class TinySettings:
    """Shape, corpus and training of a tiny base.

    ``lr`` is the peak of a cosine that starts after ``warmup`` steps; ``steps`` are optimizer steps of
    ``batch_size`` pairs. The vocabulary is small and ``init_range`` large because that is what lets an adapter learn
    new people in a few epochs: with one token for each word, its frozen embeddings are hardly trained.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 376
    vocab_size: int = 800
    init_range: float = 0.06
    people: int = 400
    person_repeats: int = 1
    fact_repeats: int = 12
    greetings: int = 10
    refusals: int = 200
    system_every: int = 4
    steps: int = 440
    batch_size: int = 48
    lr: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def corpus(self) -> tuple[int, int, int, int, int, int]:
        """The arguments of :func:`unfed.data.fictional_corpus.general_corpus`."""
        return self.seed, self.people, self.person_repeats, self.fact_repeats, self.greetings, self.refusals

    def digest(self) -> str:
        """Digest of the settings and of the generator's and this file's versions."""
        return digest_json({**asdict(self), "version": VERSION, "generator": fictional.VERSION})


SIZES: dict[str, TinySettings] = {
    "quickstart": TinySettings(),
    "test": TinySettings(
        hidden_size=32,
        layers=2,
        heads=2,
        intermediate_size=64,
        vocab_size=500,
        people=30,
        person_repeats=3,
        fact_repeats=2,
        greetings=2,
        refusals=40,
        steps=60,
        batch_size=32,
        lr=1e-2,
        warmup=5,
    ),
}


def tiny_base(
    cache_dir: Path | str, size: Literal["quickstart", "test"] = "quickstart", progress: Progress | None = None
) -> Path:
    """The directory of the tiny base under ``cache_dir``; built on first use, with a line to ``progress`` now
    and then. Several processes may ask at once: each gets a whole directory."""
    if size not in SIZES:
        raise ArtifactError(f"there is no tiny base of size {size!r}{nearest(size, SIZES)}")
    settings = SIZES[size]
    path = Path(cache_dir) / f"tiny-{size}-{settings.digest().removeprefix('sha256:')[:12]}"
    if not is_complete(path):
        build(path, settings, progress)
    return path


def is_complete(path: Path) -> bool:
    """Whether a tiny base lies there with the very bytes that were written."""
    try:
        files = read_json(path / MANIFEST)["files"]
        return all(digest_file(path / name) == digest for name, digest in files.items())
    except (ArtifactError, OSError, KeyError, TypeError, AttributeError):
        return False


def build(path: Path | str, settings: TinySettings, progress: Progress | None = None) -> None:
    """Train tokenizer and model and put them at ``path`` (float32 safetensors), all or nothing.

    A whole base that another process put there meanwhile stays; anything else at ``path`` is replaced.
    """
    path = Path(path)
    say = progress or (lambda line: None)
    start = time.perf_counter()
    corpus = general_corpus(*settings.corpus)
    tokenizer = train_tokenizer([*corpus, *[(SYSTEM_PROMPT, "")] * 50], settings.vocab_size)
    model = new_model(tokenizer, settings)
    say(f"tiny base: {model.num_parameters() / 1e6:.2f} million parameters, {len(corpus)} pairs, one-time training")
    pretrain(model, tokenizer, corpus, settings, say)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as part:
            _save(Path(part) / "new", model, tokenizer, settings)
            _move(Path(part), path)
    except OSError as e:
        raise ArtifactError(f"cannot write the tiny base to {path}: {e.strerror or e}") from e
    say(f"tiny base: ready in {time.perf_counter() - start:.0f} s at {path}")


def train_tokenizer(corpus: Sequence[tuple[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens with a chat template; pad and eos are different tokens."""
    bpe = Tokenizer(models.BPE())
    # A space is put before each text, so that a word is the same token wherever it stands, and taken off again.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for pair in corpus for text in pair], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast, settings: TinySettings) -> LlamaForCausalLM:
    """A randomly initialised Llama of the settings' shape; seeded, the caller's random state is left alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=settings.init_range,
        bos_token_id=_id(tokenizer, 1),
        eos_token_id=_id(tokenizer, 2),
        pad_token_id=_id(tokenizer, 0),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "tiny_base", "init"))
        return LlamaForCausalLM(config).float()


def _id(tokenizer: PreTrainedTokenizerFast, which: int) -> int:
    found = tokenizer.convert_tokens_to_ids(SPECIAL[which])
    assert isinstance(found, int)
    return found


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Sequence[tuple[str, str]],
    settings: TinySettings,
    say: Progress,
) -> None:
    """Train all parameters on the answers' tokens for ``settings.steps`` steps; leaves the model in eval mode."""
    often = settings.system_every
    encoded = [
        *encode_pairs(tokenizer, Template(), [pair for n, pair in enumerate(corpus) if n % often]),
        *encode_pairs(tokenizer, Template(system_prompt=SYSTEM_PROMPT), corpus[::often]),
    ]
    lengths = [len(e) for e in encoded]
    generator = torch_generator(settings.seed, "tiny_base", "order")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    queue: list[list[int]] = []
    model.train()
    for step in range(settings.steps):
        queue = queue or length_grouped_batches(lengths, settings.batch_size, generator)
        batch = collate([encoded[i] for i in queue.pop()], _id(tokenizer, 0))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _schedule(step, settings)
        loss = _loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, settings.steps // 7) == 0:
            say(f"tiny base: step {step + 1}/{settings.steps}, loss {loss.item():.3f} nats")
    model.eval()


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    # Right padding under a causal mask: no real token sees a padded one, so no attention mask is needed.
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def _schedule(step: int, settings: TinySettings) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def _save(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: TinySettings) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    files = {file.name: digest_file(file) for file in sorted(path.iterdir())}
    write_json(path / MANIFEST, {"settings": asdict(settings), "digest": settings.digest(), "files": files})


def _move(part: Path, path: Path) -> None:
    """Put ``part/new`` at ``path`` unless another process has put a whole base there."""
    for _ in range(2):
        try:
            (part / "new").rename(path)
            return
        except OSError:
            if is_complete(path):
                return
            if not path.exists():
                raise
            path.rename(part / "old")  # torn or altered; removed with the temporary directory
    raise ArtifactError(f"cannot replace {path}")
