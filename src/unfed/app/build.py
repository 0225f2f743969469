"""Objects of a run, composed from its configuration: rows, partition, objectives, schedule, clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unfed.aggregation.base import Aggregator
from unfed.aggregation.privacy import privacy_problems
from unfed.aggregation.registry import aggregator_problems, build_aggregator
from unfed.aggregation.robust_registry import SCREENING, build_robust, robust_problems
from unfed.app.progress import say
from unfed.app.ranks import client_ranks, refuse_dora
from unfed.app.rundir import PARTITION_FILE, RUN_FILE
from unfed.base.artifacts import digest_json, read_json
from unfed.base.errors import ArtifactError, ConfigError, DataError, UnfedError
from unfed.base.types import Example
from unfed.config.checks import alternate_problems
from unfed.config.checks_privacy import privacy_settings
from unfed.config.checks_robust import too_few
from unfed.config.schema import FEDERATED_TRAINERS, DatasetConfig, RunConfig
from unfed.data.datasets import load_rows
from unfed.data.given import read_given
from unfed.data.partition import Partition, PartitionSpec, make_partition
from unfed.federated.client import ClientData
from unfed.federated.screening import ScreeningSettings
from unfed.models.adapter import live_tensors, lora_scaling
from unfed.models.load import LoadedModel
from unfed.objectives.registry import objective_problems
from unfed.objectives.wrappers import wrapper_problems
from unfed.training.batches import Collation

DEFAULT_CLIENTS = 3


@dataclass(frozen=True)
class Rows:
    """The rows of a run. Fine-tuning has ``train`` (and ``forget``, to know who is to own it); unlearning has
    ``forget`` and ``retain``. ``server`` are the server's own, which no client has."""

    train: tuple[Example, ...] = ()
    forget: tuple[Example, ...] = ()
    retain: tuple[Example, ...] = ()
    server: tuple[Example, ...] = ()

    def every(self) -> list[Example]:
        """All rows that a partition deals, each once."""
        seen: dict[str, Example] = {e["id"]: e for e in (*self.train, *self.retain)}
        if not self.train:
            seen = {**{e["id"]: e for e in self.forget}, **seen}
        return list(seen.values())

    def ids(self) -> set[str]:
        """Ids of the rows that are trained on: learnt, or forgotten (fine-tuning marks its forget rows alone)."""
        return {e["id"] for e in (self.train or (*self.forget, *self.retain))}

    def digest(self) -> str:
        """Digest of every split's ids (which are digests of the texts) in order."""
        splits = {"train": self.train, "forget": self.forget, "retain": self.retain}
        splits |= {"server": self.server} if self.server else {}
        return digest_json({name: [e["id"] for e in rows] for name, rows in splits.items()})


def refuse_unknown(config: RunConfig) -> None:
    """Raise ``ConfigError`` for an unknown method, wrapper, strategy or hyperparameter, and for a method without
    the file that it trains on, before anything is loaded."""
    problems = list(alternate_problems(config))
    if config.method is not None:
        problems += objective_problems(config.method.name, config.method.params)
    if config.wrapper is not None:
        problems += wrapper_problems(config.wrapper.name, config.wrapper.params)
    if config.robust is not None:
        problems += robust_problems(config.robust.name, config.robust.params)
    if config.aggregator is not None:
        problems += aggregator_problems(config.aggregator.name, config.aggregator.params)
    if config.privacy is not None:
        problems += privacy_problems(config.privacy.name, config.privacy.params) or list(privacy_settings(config))
    if problems:
        raise ConfigError(problems)


def is_federated(config: RunConfig) -> bool:
    """Whether the trainer has clients (the others train one client that owns every row)."""
    return config.trainer is not None and config.trainer.handler in FEDERATED_TRAINERS


def read_rows(config: RunConfig) -> Rows:
    """Load the data of a fine-tuning or unlearning run; ``DataError`` names file, key or set."""
    data_dir = config.paths.data_dir
    if config.mode == "finetune":
        if config.data.train is None:
            raise ConfigError(
                ["data.train: fine-tuning needs a training set (experiment=finetune/tofu/default sets one)"]
            )
        forget = _load(config.data.forget, data_dir) if config.partition.scheme == "target" else ()
        train = _without(_load(config.data.train, data_dir), left_out(config))
        if not train:
            raise DataError("data.exclude: leaves no row of data.train")
        return Rows(train=train, forget=forget)
    gone = left_out(config) | set(config.data.forget_ids)
    rows = Rows(forget=forget_rows(config), retain=_without(_load(config.data.retain, data_dir), gone))
    if not rows.forget:
        raise ConfigError(["data.forget: unlearning needs a forget set (experiment=unlearn/tofu/default sets one)"])
    both = {e["id"] for e in rows.forget} & {e["id"] for e in rows.retain}
    if both:
        raise DataError(
            f"{len(both)} rows are both in the forget set and in the retain set: forget_split and retain_split must go "
            "together (forget01 with retain99, forget05 with retain95, forget10 with retain90)"
        )
    return rows


def rows_are_elsewhere(config: RunConfig) -> bool:
    """Whether only the clients' own machines can read the rows: here they are known by their ids."""
    return config.engine.name == "nvflare"


def forget_rows(config: RunConfig) -> tuple[Example, ...]:
    """The rows that an unlearning run is to forget."""
    if rows_are_elsewhere(config):
        return tuple({"id": i} for i in config.data.forget_ids)
    rows, chosen = _load(config.data.forget, config.paths.data_dir), set(config.data.forget_ids)
    return tuple(e for e in rows if e["id"] in chosen) if chosen else rows


def left_out(config: RunConfig) -> set[str]:
    """Ids of the rows that are neither trained on nor retained (``data.exclude``, ``data.exclude_ids``)."""
    return {e["id"] for e in _load(config.data.exclude, config.paths.data_dir)} | set(config.data.exclude_ids)


def _without(rows: Sequence[Example], gone: set[str]) -> tuple[Example, ...]:
    return tuple(e for e in rows if e["id"] not in gone)


def _load(config: DatasetConfig | None, data_dir: str | None) -> tuple[Example, ...]:
    if config is None:
        return ()
    return tuple(load_rows(config, data_dir))


def find_manifest(config: RunConfig) -> Path | None:
    """The partition manifest this run must follow: the one it names, or that beside its adapter.

    Raises ``ArtifactError`` where a training made the adapter and its manifest is gone: dealing its rows anew would
    ask clients to forget what others have learnt.
    """
    if config.partition.manifest is not None:
        return Path(config.partition.manifest)
    args = config.model.model_args
    for place in (args.lora_model_path, args.pretrained_model_name_or_path):
        if place is not None and (Path(place) / PARTITION_FILE).is_file():
            return Path(place) / PARTITION_FILE
        if place is not None and _was_trained_here(Path(place)):
            raise ArtifactError(
                f"{place}: its {PARTITION_FILE}, which says whose row is whose, is gone; give a copy of it as "
                "partition.manifest"
            )
    return None


def _was_trained_here(place: Path) -> bool:
    record = read_json(place / RUN_FILE) if (place / RUN_FILE).is_file() else {}
    return isinstance(record, dict) and record.get("mode") in {"finetune", "unlearn"}


def settle_partition(config: RunConfig, rows: Rows) -> tuple[Partition, str]:
    """Who owns what, and a sentence on where that comes from.

    Raises ``UnfedError`` when the manifest and ``num_clients`` disagree, rows belong to nobody, or ranks do not fit.
    """
    partition, where = _settled(config, rows)
    if is_federated(config):
        client_ranks(config, partition.client_ids)
    return partition, where


def _settled(config: RunConfig, rows: Rows) -> tuple[Partition, str]:
    assert config.trainer is not None
    asked = config.trainer.method_args.num_clients
    everything = rows.every()
    if not is_federated(config):
        return make_partition(everything, 1, PartitionSpec("iid"), seed=config.seed), "one client owns every row"
    manifest = find_manifest(config)
    if manifest is None:
        lost = {e["id"] for e in rows.forget} - {e["id"] for e in everything}
        if lost and config.partition.scheme == "target":
            say(
                f"partition: {len(lost)} of {len(rows.forget)} forget rows are not in the training data, so no client "
                "will own them (data.forget, data.train)"
            )
        made = _deal(config, rows, everything, asked or DEFAULT_CLIENTS)
        return made, f"made here: {made.scheme}, {len(made.clients)} clients"
    partition = read_given(manifest, everything, numbers=config.mode == "finetune")
    if asked is not None and asked != len(partition.clients):
        raise UnfedError(
            f"trainer.method_args.num_clients={asked}, but {manifest} deals the rows to {len(partition.clients)} "
            "clients: leave num_clients out, or fine-tune again with that many"
        )
    new = partition.unknown(everything)
    if new and config.mode == "finetune" and config.partition.manifest is None:
        # Going on from an adapter with other data than it was made with.
        dealt = _deal(config, rows, new, len(partition.clients))
        return partition.extended(dealt), f"as in {manifest}; {len(new)} new rows dealt: {dealt.scheme}"
    partition.owners(e["id"] for e in everything)
    return partition, f"as in {manifest}"


def _deal(config: RunConfig, rows: Rows, dealt: Sequence[Example], clients: int) -> Partition:
    assert config.trainer is not None
    target = config.trainer.method_args.target_client_idx
    spec = PartitionSpec(
        scheme=config.partition.scheme,
        rest=config.partition.rest,
        alpha=config.partition.alpha,
        target_client_idx=target if isinstance(target, int) else 0,
        target_shares=config.partition.target_shares,
        over=config.partition.over,
        topics=config.partition.topics,
    )
    forget = {e["id"] for e in rows.forget} & {e["id"] for e in dealt}
    if spec.scheme == "target" and not forget:
        spec = replace(spec, scheme=spec.rest, target_client_idx=0)
    return make_partition(dealt, clients, spec, forget, config.seed)


def targets_of(config: RunConfig, partition: Partition, forget_ids: Sequence[str]) -> list[str]:
    """The clients that unlearn. ``UnfedError`` when the target client does not own the whole forget set."""
    assert config.trainer is not None
    owners = partition.owners(forget_ids)
    wanted = config.trainer.method_args.target_client_idx
    if wanted is None:
        wanted = "all" if config.forget.given else 0
    if wanted == "all" or not is_federated(config):
        return list(owners)
    names = partition.client_ids
    if not 0 <= wanted < len(names):
        raise UnfedError(
            f"trainer.method_args.target_client_idx={wanted}: the run has {len(names)} clients (0 to {len(names) - 1})"
        )
    target = names[wanted]
    others = {c: len(ids) for c, ids in owners.items() if c != target}
    if others:
        held = ", ".join(f"{c} {n}" for c, n in others.items())
        raise UnfedError(
            f"trainer.method_args.target_client_idx={wanted}: {target} owns {len(owners.get(target, ()))} of the "
            f"{len(forget_ids)} forget rows, others the rest ({held}). Use trainer.method_args.target_client_idx=all "
            "to let every owner unlearn its rows, or fine-tune with partition=target and this forget_split"
        )
    return [target]


def refuse_few(config: RunConfig, clients: int) -> None:
    """Raise ``ConfigError`` where no round of ``clients`` is large enough for the robust rule, whoever answers."""
    given = config.robust
    if given is not None and given.name != SCREENING and (complaint := too_few(config, given, clients)):
        raise ConfigError([f"robust={given.name}: {complaint} (the partition has {clients} clients)"])


def server_rule(config: RunConfig, loaded: LoadedModel, partition: Partition) -> Aggregator:
    """The aggregation rule, told the adapter's scaling and the clients' ranks.

    Raises ``ConfigError`` for an adapter that it cannot average.
    """
    if config.aggregator is None:
        return build_aggregator("FedAvg", {})
    scaling = lora_scaling(loaded.model) or 1.0
    rule = build_aggregator(
        config.aggregator.name,
        config.aggregator.params,
        lora_scaling=scaling,
        probe_seed=config.seed,
        ranks=client_ranks(config, partition.client_ids) if is_federated(config) else None,
    )
    refuse_dora(rule, live_tensors(loaded.model))
    given = config.robust
    if given is None or given.name == SCREENING:
        return rule
    robust = build_robust(given.name, given.params, scaling=scaling, seed=config.seed)
    return replace(rule, filters=(*rule.filters, robust))


def screening(config: RunConfig, loaded: LoadedModel, clients: Mapping[str, ClientData]) -> ScreeningSettings:
    """What an update is held to; ``clients`` are those of the partition."""
    ratio = config.robust.max_norm_ratio if config.robust is not None else None
    owned = {c: max(map(len, d.splits.values()), default=0) for c, d in clients.items()}
    return ScreeningSettings(ratio, lora_scaling(loaded.model) or 1.0, owned)


def collation(config: RunConfig, loaded: LoadedModel, pad: int | None = None) -> Collation:
    """How rows become padded batches. ``pad``: the id to pad with (``None``: the tokenizer's)."""
    found = loaded.tokenizer.pad_token_id if pad is None else pad
    assert isinstance(found, int)
    return Collation(found, config.collator.padding_side, config.collator.pad_to_multiple_of)
