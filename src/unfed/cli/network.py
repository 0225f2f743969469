"""``unfed network``: kits for a network's parties, running one of them, and jobs over it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from unfed.base.errors import ConfigError, UnfedError, nearest
from unfed.cli.launch import USER_ERROR, guarded

if TYPE_CHECKING:
    from unfed.config.schema import RunConfig

FAILED = 1
COMPLETED = "FINISHED:COMPLETED"
KIT = "UNFED_KIT"
POLL_SECONDS = 1.0
WAIT_SECONDS = 60.0
USAGE = """\
unfed network <command>

  provision PROJECT.yml [--workspace DIR]   certificates and a startup kit for every party
  start KIT                                 run the server, or a site, in the foreground
  submit --kit KIT [--config-name=NAME] [--sites a,b] [--detach] <overrides>
                                            a run on the sites that are connected: the overrides of unfed train, or,
                                            with --config-name=unlearn-lora.yaml, those of unfed unlearn
  status --kit KIT [JOB]                    sites and jobs; one job
  logs --kit KIT JOB                        what a job's server has said
  abort --kit KIT JOB                       end a job; its finished rounds stay, resume=true goes on from them

KIT is the folder of a startup kit; submit, status, logs and abort take an administrator's (or UNFED_KIT)."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 for a job that failed, 2 for what the user can mend."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in {"-h", "--help"}:
        print(USAGE)
        return 0
    command = COMMANDS.get(given[0])
    if command is None:
        print(f"error: unfed network {given[0]}: no such command{nearest(given[0], COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    if {"-h", "--help"} & set(given[1:]):
        print(USAGE)
        return 0
    return guarded(lambda: _with_nvflare(command, given[1:]))


def _with_nvflare(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    from unfed.app.network import need_nvflare

    need_nvflare()
    return command(argv)


def _provision(argv: Sequence[str]) -> int:
    from unfed.app.network import provision, valid_until
    from unfed.config.project import read_project

    parser = _parser("provision")
    parser.add_argument("project", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path("network"))
    given = _parsed(parser, argv)
    kits = provision(read_project(given.project), given.workspace)
    print(f"kits: {kits}\n  " + "\n  ".join(sorted(k.name for k in kits.iterdir())))
    end = min(valid_until(kit) for kit in kits.iterdir())
    print(
        f"Their certificates are valid until {end:%Y-%m-%d}. Give each party its own folder over a channel that others "
        f"cannot read: it holds the party's private key. Keep "
        f"{given.workspace} at one safe place: it holds the key of the network's certificate authority."
    )
    return 0


def _start(argv: Sequence[str]) -> int:
    from unfed.app.network import check_validity, start_command

    parser = _parser("start")
    parser.add_argument("kit", type=Path)
    kit = _parsed(parser, argv).kit
    command = start_command(kit)
    if soon := check_validity(kit):
        print(f"WARNING: {soon}", flush=True)
    os.umask(0o077)
    os.chdir(kit)
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - our own interpreter; signals reach NVFlare itself


def _submit(argv: Sequence[str]) -> int:
    from unfed.app.network import write_job
    from unfed.app.nvflare_app import session

    parser = _with_kit("submit")
    parser.add_argument("--config-name", default="train-lora.yaml")
    parser.add_argument("--sites")
    parser.add_argument("--detach", action="store_true")
    given, overrides = _known(parser, argv)
    named = _named(given.sites)
    config = _run_of([f"--config-name={given.config_name}", "engine=nvflare", *overrides], given.config_name)
    with session(_kit(given)) as opened, tempfile.TemporaryDirectory() as place:
        sites = _sites(opened, named or _expected(config), config)
        write_job(Path(place) / "job", config, sites)
        job = opened.submit_job(str(Path(place) / "job"))
        print(f"job {job} on {', '.join(sites)}; the run: {config.paths.output_dir}", flush=True)
        return 0 if given.detach else _follow(opened, job)


def _expected(config: RunConfig) -> list[str]:
    """The sites that an adapter was fine-tuned on, which unlearning needs; none where any will do."""
    from unfed.app.build import find_manifest
    from unfed.data.partition import Partition

    found = find_manifest(config) if config.mode == "unlearn" else None
    return list(Partition.read(found).clients) if found is not None else []


def _sites(opened: Any, wanted: Sequence[str], config: RunConfig) -> list[str]:
    """The sites of the job, waited for until they are connected."""
    count = config.trainer.method_args.num_clients if config.trainer is not None else None
    until, told = time.monotonic() + WAIT_SECONDS, False
    while True:
        there = sorted(c.name for c in opened.get_system_info().client_info)
        lacking = [s for s in wanted if s not in there]
        if not lacking and there and (wanted or count is None or len(there) >= count):
            return sorted(wanted or there)
        what = ", ".join(lacking) or f"{len(there)} of {count or 1} sites"
        if time.monotonic() > until:
            raise UnfedError(f"{what}: not connected; connected are {', '.join(there) or 'none'}")
        if not told:
            print(f"waiting for {what} to connect", flush=True)
        told = True
        time.sleep(POLL_SECONDS)


def _run_of(argv: Sequence[str], config_name: str) -> RunConfig:
    """The run, with absolute paths: the server's process stands elsewhere."""
    from unfed.config.compat import resolve

    config = resolve(argv, config_name, files=True)
    args = config.model.model_args

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    named = ("pretrained_model_name_or_path", "lora_model_path", "base_model_name_or_path")
    args = replace(args, **{k: absolute(getattr(args, k)) for k in named})
    paths = replace(
        config.paths,
        root_dir=str(Path(config.paths.root_dir).resolve()),
        data_dir=absolute(config.paths.data_dir),
        output_dir=str(Path(config.paths.output_dir).resolve()),
    )
    if config.engine.name != "nvflare":
        raise ConfigError([f"engine={config.engine.name}: unfed network submit runs engine=nvflare"])
    return replace(config, model=replace(config.model, model_args=args), paths=paths)


def _follow(opened: Any, job: str) -> int:
    """Print what the job says until it ends."""
    from unfed.app.nvflare_app import said_by
    from unfed.app.runs import SAVED

    shown = 0
    while True:
        status = str(opened.get_job_status(job))
        lines = said_by(opened, job)
        for line in lines[shown:]:
            print(line, flush=True)
        shown = max(shown, len(lines))
        if status.startswith("FINISHED"):
            # NVFlare calls a job abnormal whose site was lost on the way, also where the rounds went on without it.
            lost = status != COMPLETED and any(line.startswith(SAVED) for line in lines)
            print(f"job {job}: {status}" + lost * ", but the run is finished: a site was lost on the way", flush=True)
            return 0 if lost or status == COMPLETED else FAILED
        time.sleep(POLL_SECONDS)


def _status(argv: Sequence[str]) -> int:
    from unfed.app.nvflare_app import session

    parser = _with_kit("status")
    parser.add_argument("job", nargs="?")
    given = _parsed(parser, argv)
    with session(_kit(given)) as opened:
        if given.job is not None:
            meta = opened.get_job_meta(given.job)
            wanted = ("job_id", "name", "status", "submitter_name", "submit_time_iso", "duration", "job_deploy_detail")
            print("\n".join(f"{k}: {meta[k]}" for k in wanted if k in meta))
            return 0
        for client in opened.get_system_info().client_info:
            print(f"site {client.name}")
        for job in opened.list_jobs():
            print(f"job {job.get('job_id')}  {job.get('status')}  {job.get('job_name') or job.get('name')}")
    return 0


def _logs(argv: Sequence[str]) -> int:
    from unfed.app.nvflare_app import said_by, session

    given = _job(argv, "logs")
    with session(_kit(given)) as opened:
        print("\n".join(said_by(opened, given.job)))
    return 0


def _abort(argv: Sequence[str]) -> int:
    from unfed.app.nvflare_app import session

    given = _job(argv, "abort")
    with session(_kit(given)) as opened:
        status = str(opened.get_job_status(given.job))
        if status.startswith("FINISHED"):
            raise UnfedError(f"job {given.job} is over: {status}")
        opened.abort_job(given.job)
        until = time.monotonic() + WAIT_SECONDS
        while not (status := str(opened.get_job_status(given.job))).startswith("FINISHED"):
            if time.monotonic() > until:
                raise UnfedError(f"job {given.job} was told to end and is still {status}")
            time.sleep(POLL_SECONDS)
    print(f"job {given.job}: {status}")
    return 0


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UnfedError(f"{self.prog}: {message}; unfed network --help")


def _parser(command: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"unfed network {command}", usage=USAGE, add_help=False, exit_on_error=False)


def _with_kit(command: str) -> argparse.ArgumentParser:
    parser = _parser(command)
    parser.add_argument("--kit", type=Path, default=os.environ.get(KIT))
    return parser


def _job(argv: Sequence[str], command: str) -> argparse.Namespace:
    parser = _with_kit(command)
    parser.add_argument("job")
    return _parsed(parser, argv)


def _named(sites: str | None) -> list[str]:
    """The sites of ``--sites``; none where it is not given. ``UnfedError``: a name is empty, or there twice."""
    names = [] if sites is None else [name.strip() for name in sites.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UnfedError(f"--sites={sites}: must be names of sites with commas between them, each once")
    return names


def _known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        return parser.parse_known_args(list(argv))
    except argparse.ArgumentError as e:
        raise UnfedError(f"{parser.prog}: {e}") from e


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    given, rest = _known(parser, argv)
    if rest:
        known = [o for action in parser._actions for o in action.option_strings]  # noqa: SLF001 - it has no other list
        near = nearest(rest[0], known) if rest[0].startswith("-") else ""
        raise UnfedError(f"{parser.prog}: {rest[0]} is not understood{near}; unfed network --help")
    return given


def _kit(given: argparse.Namespace) -> Path:
    from unfed.app.network import check_validity, role_of

    if given.kit is None:
        raise UnfedError(f"--kit: the folder of an administrator's startup kit is needed (or set {KIT})")
    kit = Path(given.kit).resolve()
    if role_of(kit) != "admin":
        raise UnfedError(f"--kit={given.kit}: is the kit of a {role_of(kit)}, and an administrator's is needed")
    if soon := check_validity(kit):
        print(f"WARNING: {soon}", file=sys.stderr)
    return kit


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "provision": _provision,
    "start": _start,
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "abort": _abort,
}
