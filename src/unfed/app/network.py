"""A network's files: certificates and startup kits for every party, what each permits, and the folder of a job.

NVFlare makes the kits (a private CA, mutual TLS bound to a party's name); what it leaves open is closed here: code that
travels with a job is refused everywhere, only our own classes are made, no log leaves a site, jobs lie in the server's
kit. NVFlare itself is not imported.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from unfed.app.rundir import plain
from unfed.base.artifacts import read_json, write_json
from unfed.base.errors import UnfedError
from unfed.config.project import Project
from unfed.config.schema import RunConfig
from unfed.config.site import SITE_FILE, ServerFile, SiteFile, read_site_file

CLASSES = (
    "nvflare.collab.runtime.controller.CollabController",
    "nvflare.collab.runtime.executor.CollabExecutor",
    "unfed.app.nvflare_app.Server",
    "unfed.app.nvflare_app.Site",
)
"""All that a job may name."""
RIGHTS: Mapping[str, Any] = {
    "format_version": "1.0",
    "permissions": {
        "project_admin": {
            "submit_job": "any",
            "manage_job": "any",
            "download_job": "any",
            "view": "any",
            "get_job_log": "any",
            "operate": "any",
            "clone_job": "none",
            "shell_commands": "none",
            "byoc": "none",
            "server-predeployed-flwr": "none",
        },
        "member": {"view": "any"},
    },
}
SOON_DAYS = 30
NO_LOGS = ("site_log_streamer", "log_receiver")
"""NVFlare's components that send logs of sites to the server, and take them there."""

SITE_TEMPLATE = """\
# What this site has and permits. It stays here: no path in it is told to anybody. Relative to the kit's folder.
data_dir: data          # data/<set>/<name>.json, JSON lines: {"question": ..., "answer": ...}
base_model: base_model  # the same base model as everywhere; weights, settings and tokenizer are compared
datasets: [locuslab/TOFU]            # sets that a job may ask for
tasks: [finetune, unlearn, measure]  # what may be done with them
largest_payload: 512    # MB of one message
smallest_share: 1       # refuse to train on fewer rows than that
state: state            # tensors that never leave this site
"""
SERVER_TEMPLATE = """\
# The server's one place for runs: nothing is written elsewhere. Relative to the kit's folder.
outputs: saves
"""


def provision(project: Project, workspace: Path) -> Path:
    """Make a startup kit for every party; the folder that holds them.

    The CA stays in ``workspace``: the same command with more sites in ``project`` makes kits of the same network.
    """
    need_nvflare()
    described = workspace / "nvflare.yml"
    try:
        if workspace.is_dir() and any(workspace.iterdir()) and not described.is_file():
            raise UnfedError(f"{workspace} holds other files: give --workspace a folder of the network's own")
        workspace.mkdir(parents=True, exist_ok=True)
        os.chmod(workspace, 0o700)
    except OSError as e:
        raise UnfedError(f"--workspace={workspace}: {e.strerror or e}") from e
    described.write_text(yaml.safe_dump(_described(project), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", str(described), "-w", str(workspace), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    made = sorted((workspace / project.name).glob("prod_*"))
    if done.returncode or not made:
        raise UnfedError(f"nvflare provision failed: {(done.stderr or done.stdout).strip()[-500:]}")
    kits = made[-1]
    for kit in (k for k in kits.iterdir() if k.is_dir()):
        _close(kit)
    return kits


def _described(project: Project) -> dict[str, Any]:
    """The project as NVFlare describes one."""

    def party(name: str, kind: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "type": kind, "org": project.organisations.get(name, "unfed"), **more}

    server = party(project.host, "server", fed_learn_port=project.port, admin_port=project.port)
    people = [party(n, "admin", role="project_admin") for n in project.admins]
    people += [party(n, "admin", role="member") for n in project.members]
    impl = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": project.name,
        "participants": [server, *(party(n, "client") for n in project.sites), *people],
        "builders": [
            {"path": f"{impl}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
            {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "grpc"}},
            {"path": f"{impl}.cert.CertBuilder", "args": {"root_valid_days": project.valid_days}},
            {"path": f"{impl}.signature.SignatureBuilder"},
        ],
    }


def _close(kit: Path) -> None:
    """Only the owner may look into the kit, and what NVFlare leaves open is closed."""
    os.chmod(kit, 0o700)
    for key in kit.glob("startup/*.key"):
        os.chmod(key, 0o600)
    local, role = kit / "local", role_of(kit)
    if role == "admin":
        return
    resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    resources |= {"class_list_enforcement_mode": "enforce", "class_allow_list": list(CLASSES)}
    resources["allow_log_streaming"] = False
    resources["components"] = [c for c in resources["components"] if c["id"] not in NO_LOGS]
    for component in resources["components"]:
        if component["id"] == "job_scheduler":
            component["args"]["max_jobs"] = 1
    write_json(local / "resources.json", resources)
    _here(kit.resolve())
    write_json(local / "authorization.json", RIGHTS)
    template = SERVER_TEMPLATE if role == "server" else SITE_TEMPLATE
    (local / SITE_FILE).write_text(template, encoding="utf-8")
    os.chmod(local / SITE_FILE, 0o600)


def valid_until(kit: Path) -> datetime:
    """When the certificate of a kit's party, or that of its authority, ends. ``UnfedError``: they cannot be read."""
    from cryptography import x509  # pyright: ignore[reportMissingImports] - NVFlare brings it

    ends = []
    for name in ("rootCA.pem", "server.crt" if role_of(kit) == "server" else "client.crt"):
        try:
            found = x509.load_pem_x509_certificate((kit / "startup" / name).read_bytes())
        except (OSError, ValueError) as e:
            raise UnfedError(f"{kit / 'startup' / name}: is no certificate that could be read") from e
        ends.append(found.not_valid_after_utc)
    return min(ends)


def check_validity(kit: Path) -> str | None:
    """A reminder where a kit's certificates end soon; ``UnfedError`` where they have ended."""
    end = valid_until(kit)
    left = (end - datetime.now(UTC)).days
    if left >= SOON_DAYS:
        return None
    renew = "the operator renews all of them: docs/network.md, Renewal"
    if left < 0:
        raise UnfedError(f"the certificates of {kit} ended on {end:%Y-%m-%d}; {renew}")
    return f"the certificates of {kit} end on {end:%Y-%m-%d}, in {left} days; {renew}"


def role_of(kit: Path) -> str:
    """``server``, ``site`` or ``admin``; ``UnfedError`` for a folder that is no startup kit."""
    for role, file in (("server", "fed_server.json"), ("site", "fed_client.json"), ("admin", "fed_admin.json")):
        if (kit / "startup" / file).is_file():
            return role
    raise UnfedError(
        f"{kit} is no startup kit (there is no startup/fed_server.json, fed_client.json or fed_admin.json)"
    )


def start_command(kit: Path) -> list[str]:
    """The command that runs a party; its own file is looked at first. Job store and snapshots follow a moved kit."""
    need_nvflare()
    role, kit = role_of(kit), kit.resolve()
    if role == "admin":
        raise UnfedError(f"{kit} is the kit of a person; give it to unfed network submit --kit")
    own = kit / "local" / SITE_FILE
    _ = read_site_file(own, ServerFile) if role == "server" else read_site_file(own, SiteFile)
    told = ["secure_train=true", "config_folder=config", *_told(kit)]
    _here(kit)
    for place in ("transfer", "jobs", "snapshots"):
        (kit / place).mkdir(mode=0o700, exist_ok=True)
    app, file = ("server.server_train", "fed_server") if role == "server" else ("client.client_train", "fed_client")
    command = [sys.executable, "-u", "-m", "unfed.app.party", f"nvflare.private.fed.app.{app}"]
    command += ["-m", str(kit), "-s", f"{file}.json"]
    return [*command, "--set", *told]


def _told(kit: Path) -> list[str]:
    """What NVFlare's own start script sets: the party's organisation and name."""
    file = kit / "startup" / "sub_start.sh"
    try:
        script = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UnfedError(f"{file} cannot be read: the kit is not as unfed network provision made it") from e
    return sorted(set(re.findall(r"\b(?:org|uid)=[^\s\"']+", script)))


def _here(kit: Path) -> None:
    """Absolute paths in the server's settings follow the kit to wherever it was moved."""
    file = kit / "local" / "resources.json"
    resources = read_json(file)
    try:
        for component in resources.get("components", ()):
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = str(kit / "jobs")
        if "snapshot_persistor" in resources:
            resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
    except (AttributeError, KeyError, TypeError) as e:
        raise UnfedError(f"{file}: is not as unfed network provision made it") from e
    write_json(file, resources)


def write_job(folder: Path, config: RunConfig, sites: Sequence[str]) -> None:
    """A job in ``folder``: settings for the server, nothing but the name of a class for the sites."""
    collab = "nvflare.collab.runtime"
    names = sorted(sites)
    # NVFlare looks for components and expressions of its own in settings: there is none in letters and digits.
    text = base64.b64encode(json.dumps(plain(config)).encode()).decode()
    server = {
        "format_version": 2,
        "workflows": [
            {"id": "rounds", "path": f"{collab}.controller.CollabController", "args": {"server_obj_id": "unfed"}}
        ],
        "components": [
            {"id": "unfed", "path": "unfed.app.nvflare_app.Server", "args": {"config": text, "sites": names}}
        ],
    }
    executor = {"path": f"{collab}.executor.CollabExecutor", "args": {"client_obj_id": "unfed"}}
    site = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": "unfed", "path": "unfed.app.nvflare_app.Site", "args": {}}],
    }
    deploy = {"server": ["server"], "site": names}
    # With more than one NVFlare ends a job whose sites become fewer; how many a round needs is the run's to say.
    meta = {"name": config.task_name, "resource_spec": {}, "min_clients": 1, "deploy_map": deploy}
    for place, body in (("server/config/config_fed_server", server), ("site/config/config_fed_client", site)):
        (folder / place).parent.mkdir(parents=True)
        write_json(folder / f"{place}.json", body)
    write_json(folder / "meta.json", meta)


def need_nvflare() -> None:
    """``UnfedError`` where NVFlare is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise UnfedError("unfed network needs NVFlare, which is not installed: pip install 'unfed[network]'")
