"""The whole of what goes into a run, as frozen dataclasses. Nothing below ``config`` sees a DictConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from unfed.base.params import STRICT
from unfed.config.schema_clients import ClientsConfig
from unfed.config.schema_engine import EngineConfig
from unfed.config.schema_eval import EvalConfig
from unfed.data.spec import DatasetSpec as DatasetConfig
from unfed.data.spec import Template as TemplateArgs
from unfed.models.spec import ModelArgs, TokenizerArgs
from unfed.objectives import names

AGGREGATORS = ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedProx", "FedNova", "Scaffold")
METHODS = tuple(names.METHODS)
RECIPES = (
    "local_then_recover",
    "interleaved",
    "retrain",
    "rollback",
    "federaser",
    "pga",
    "fedosd",
    "subtract",
    "distill",
    "isolated",
    "unlearning_adapter",
    "task_arithmetic",
    "not_lora",
)
ROBUST = ("screening", "median", "trimmed_mean", "krum", "multi_krum", "norm_clipping", "fltrust")
WRAPPERS = ("SAM", "GRU", "EWC")
PRIVACY = ("central", "local", "example")
WIRES = ("float32", "bfloat16", "int8", "topk")
UNSET = "MISSING"
"""Stands for a setting that has to be given and was not, so that one message says so and no other."""
FEDERATED_TRAINERS = ("FederatedFinetune", "FederatedUnlearningTrainer")


@dataclass(frozen=True)
class ModelConfig:
    __pydantic_config__: ClassVar[Any] = STRICT
    model_args: ModelArgs
    tokenizer_args: TokenizerArgs = TokenizerArgs()
    template_args: TemplateArgs = TemplateArgs()


@dataclass(frozen=True)
class MethodArgs:
    """``trainer.method_args``: the shape of a federated run.

    ``target_client_idx``: an index, or ``all`` for every client that owns forget rows; ``None``: ``all`` where
    ``forget.*`` says what to forget, else 0. ``unlearn_trainer_cls``, ``aggregation_strategy`` and ``schedule`` name
    the method, the aggregator and the recipe as ``method=``, ``aggregator=`` and ``recipe=`` do.
    Local epochs of one round are ``trainer.args.num_train_epochs``; ``unlearn_epochs`` are the target's own.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    num_clients: int | None = None  # None: as partition.json says, else 3
    target_client_idx: int | Literal["all"] | None = None
    unlearn_trainer_cls: str | None = None
    aggregation_strategy: str | None = None
    global_rounds: int = 2
    unlearn_epochs: float | None = None  # None: num_train_epochs
    schedule: str | None = None
    fraction_fit: float = 1.0
    min_clients: int = 1
    lr_schedule: Literal["phase", "round"] = "phase"


@dataclass(frozen=True)
class TrainerConfig:
    """``handler`` is FederatedFinetune, FederatedUnlearningTrainer, finetune, or a method's name
    (centralised unlearning). ``args`` are transformers' ``TrainingArguments`` plus ``warmup_epochs``."""

    __pydantic_config__: ClassVar[Any] = STRICT
    handler: str
    args: Mapping[str, Any] = field(default_factory=dict)
    method_args: MethodArgs = MethodArgs()


@dataclass(frozen=True)
class MethodConfig:
    """An unlearning method by name, and its hyperparameters (checked against the objective's own fields)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WrapperConfig:
    """What goes around the method, by name, and its hyperparameters (checked against the wrapper's own fields)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AggregatorConfig:
    """A server rule by name, and its hyperparameters (checked against the rule's own fields)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RobustConfig:
    """A robust rule by name (``screening``: none), its hyperparameters (checked against the rule's own fields), and
    what goes with any of them: ``max_norm_ratio``, the number of times that a client's step may be as long as the
    round's median (``None``: any). ``root``, for fltrust: how many training rows the server keeps for itself, or a file
    of rows (``None``, in an unlearning run: those of the fine-tuning)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    max_norm_ratio: float | None = None
    root: int | str | None = None


@dataclass(frozen=True)
class HostileConfig:
    """Clients that do harm, for studies of robust rules alone: see :mod:`unfed.federated.hostile`.

    ``clients``: by name or index; none: the last ``count``.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    name: Literal["sign_flip", "scale", "random", "label_flip"]
    clients: tuple[int | str, ...] = ()
    count: int = 1
    factor: float | None = None


@dataclass(frozen=True)
class RecipeConfig:
    """A way of forgetting across clients by name, and its hyperparameters (checked against the recipe's own fields)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PrivacyConfig:
    """A kind of differential privacy by name, and its settings (checked against the kind's own fields)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WireConfig:
    """How updates travel, by name, and the format's hyperparameters (checked against its own fields)."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HistoryConfig:
    """What a training keeps for later requests to forget: see :class:`unfed.federated.history.HistorySettings`."""

    __pydantic_config__: ClassVar[Any] = STRICT
    keep: tuple[Literal["rounds", "updates", "sums"], ...] = ()
    every: int = 1


@dataclass(frozen=True)
class PersonaliseConfig:
    """``epochs``: of each client's fine-tuning of the served adapter on its own rows after the last round; 0: none."""

    __pydantic_config__: ClassVar[Any] = STRICT
    epochs: float = 0.0


@dataclass(frozen=True)
class PartitionConfig:
    """``target``: the target client owns every forget row and the rest is dealt by ``rest`` (``target_shares``: to the
    target as well; false: it owns nothing else, and can leave as a whole).
    ``author`` keeps a person's rows together, ``topic`` those of a topic. ``alpha``: concentration of the Dirichlet
    schemes; ``over``: whose rows each draw of ``dirichlet`` spreads. ``ranks``: LoRA ranks of the clients in
    order, or one for all (``None``: the adapter's)."""

    __pydantic_config__: ClassVar[Any] = STRICT
    scheme: Literal["target", "iid", "author", "topic", "dirichlet", "quantity", "file"] = "target"
    rest: Literal["iid", "author", "topic", "dirichlet", "quantity"] = "iid"
    alpha: float = 0.5
    over: Literal["author", "topic"] = "author"
    topics: int | None = None  # how many; None: by the number of rows
    target_shares: bool = True
    manifest: str | None = None  # a partition.json, or a file of client -> rows, to use instead
    ranks: tuple[int, ...] | int | None = None


@dataclass(frozen=True)
class ForgetConfig:
    """What to forget, among the rows of the fine-tuning: everything that any of these names.

    ``ids``: rows as in ``partition.json``; ``clients``: by name or index; ``authors``: people, with all their rows;
    ``topics``: words, and rows whose TF-IDF cosine to them is at least ``topic_threshold``.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    ids: tuple[str, ...] = ()
    clients: tuple[int | str, ...] = ()
    authors: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    topic_threshold: float = 0.2

    @property
    def given(self) -> bool:
        """Whether anything is named; if not, ``data.forget`` says what to forget."""
        return bool(self.ids or self.clients or self.authors or self.topics)


@dataclass(frozen=True)
class DataConfig:
    """Fine-tuning reads ``train`` (and ``forget``, to know which rows the target client will own);
    unlearning reads ``forget`` and ``retain``; ``idk`` is a file of refusals (``None``: our own list), ``alternate``
    one of other answers to the forget questions, used instead of refusals (``unfed alternates`` writes it). Rows of
    ``exclude`` are left out of ``train`` and ``retain``: what an oracle must not see.

    Ids that a run settles for itself (see :mod:`unfed.app.requests`): ``forget_ids`` are the rows of ``forget`` to be
    forgotten (none: all), and are not retained; ``exclude_ids`` are left out like the rows of ``exclude``.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    train: DatasetConfig | None = None
    forget: DatasetConfig | None = None
    retain: DatasetConfig | None = None
    exclude: DatasetConfig | None = None
    idk: str | None = None
    alternate: str | None = None
    forget_ids: tuple[str, ...] = ()
    exclude_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class CollatorConfig:
    __pydantic_config__: ClassVar[Any] = STRICT
    name: Literal["DataCollatorForSupervisedDataset"] = "DataCollatorForSupervisedDataset"
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class PathsConfig:
    __pydantic_config__: ClassVar[Any] = STRICT
    root_dir: str
    data_dir: str | None
    output_dir: str


@dataclass(frozen=True)
class RunConfig:
    """One run: ``mode`` is finetune, unlearn or eval; ``output_dir`` is ``saves/<mode>/<task_name>``."""

    mode: Literal["finetune", "unlearn", "eval"]
    task_name: str
    model: ModelConfig
    paths: PathsConfig
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    oracle: Literal["auto"] | None = None
    trainer: TrainerConfig | None = None
    method: MethodConfig | None = None
    wrapper: WrapperConfig | None = None
    aggregator: AggregatorConfig | None = None
    recipe: RecipeConfig | None = None
    privacy: PrivacyConfig | None = None
    robust: RobustConfig | None = None
    hostile: HostileConfig | None = None
    wire: WireConfig | None = None
    history: HistoryConfig = HistoryConfig()
    personalise: PersonaliseConfig = PersonaliseConfig()
    forget: ForgetConfig = ForgetConfig()
    engine: EngineConfig = EngineConfig()
    partition: PartitionConfig = PartitionConfig()
    clients: ClientsConfig = ClientsConfig()
    data: DataConfig = DataConfig()
    collator: CollatorConfig = CollatorConfig()
    eval: EvalConfig | None = None
