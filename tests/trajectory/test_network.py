"""A network of real processes on this machine: a server, three sites, mutual TLS. Needs NVFlare, and takes minutes.

Jobs train the small model. What they do with messages is tested without NVFlare in ``test_network_fleet.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from network_fixtures import SITES, TRAINING, Network, processes, unfed

from unfed.base.artifacts import read_json
from unfed.base.errors import UnfedError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="NVFlare is not installed (unfed[network])"),
]


@pytest.fixture(scope="module")
def finetuned(network, small_base):
    """A fine-tuning over the network: ``saves/finetune/net``."""
    base = f"model.model_args.pretrained_model_name_or_path={small_base}"
    network.submit(base, "task_name=net", "forget_split=forget01", "trainer.method_args.global_rounds=2")
    return base


def test_fine_tuning_and_unlearning_give_the_adapters_of_runs_in_one_place(network, finetuned):
    here = ("paths.data_dir=data",)
    manifest = "partition.manifest=saves/finetune/net/partition.json"
    rounds = ("forget_split=forget01", "trainer.method_args.global_rounds=2")
    unfed("train", *TRAINING, finetuned, "task_name=here", *rounds, manifest, *here, cwd=network.place)
    assert network.weights("finetune/net") == network.weights("finetune/here")
    unlearning = ("method=NPO", "forget_split=forget01", "retain_split=retain99", "trainer.method_args.global_rounds=1")
    model = "model.model_args.pretrained_model_name_or_path=saves/finetune/"
    network.submit(f"{model}net", "task_name=net", *unlearning, config="unlearn-lora.yaml")
    everybody = "trainer.method_args.target_client_idx=all"
    unfed("unlearn", *TRAINING, f"{model}here", "task_name=here", *unlearning, everybody, *here, cwd=network.place)
    assert network.weights("unlearn/net") == network.weights("unlearn/here")
    assert network.weights("unlearn/net") != network.weights("finetune/net")


def test_nothing_of_the_sites_lies_at_the_server_and_private_things_are_private(network, finetuned):
    del finetuned
    row = "old maps and green lamps"
    assert row in (network.kits / "site-1" / "data" / "tofu" / "full.json").read_text(encoding="utf-8")
    for place in (network.kits / "localhost", network.place / "saves"):
        for file in (f for f in place.rglob("*") if f.is_file()):
            assert row.encode() not in file.read_bytes(), file
    for kit in network.kits.iterdir():
        assert kit.stat().st_mode & 0o077 == 0
    jobs = network.kits / "localhost" / "jobs"
    assert any(jobs.iterdir()) and jobs.stat().st_mode & 0o077 == 0


def job_folder(network: Network, small_base: Path, place: Path) -> Path:
    """A proper job, to be altered."""
    from unfed.app.network import write_job
    from unfed.config.compat import resolve

    given = [
        *TRAINING,
        f"model.model_args.pretrained_model_name_or_path={small_base}",
        "task_name=odd",
        "engine=nvflare",
    ]
    write_job(place / "job", resolve([*given, f"paths.root_dir={network.place}"], "train-lora.yaml"), SITES)
    return place / "job"


def ended(network: Network, job: Path):
    with network.session() as opened:
        number = opened.submit_job(str(job))
        until = time.monotonic() + 180
        while not str(status := opened.get_job_status(number)).startswith("FINISHED") and time.monotonic() < until:
            time.sleep(1)
        return str(status), opened.get_job_meta(number)


def test_a_job_that_carries_code_is_refused_by_every_site(network, small_base, tmp_path):
    job = job_folder(network, small_base, tmp_path)
    (job / "site" / "custom").mkdir()
    (job / "site" / "custom" / "evil.py").write_text("open('/tmp/evil', 'w')\n", encoding="utf-8")
    status, meta = ended(network, job)
    assert status == "FINISHED:FAILED_TO_RUN"
    refused = [line for line in meta["job_deploy_detail"] if "BYOC not permitted" in line]
    assert sorted(line.split(":")[0] for line in refused) == list(SITES)


def test_a_job_that_names_another_class_does_not_run(network, small_base, tmp_path):
    job = job_folder(network, small_base, tmp_path)
    file = job / "site" / "config" / "config_fed_client.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw["components"][0]["path"] = "subprocess.Popen"
    file.write_text(json.dumps(raw), encoding="utf-8")
    status, _ = ended(network, job)
    assert status.startswith("FINISHED:") and status != "FINISHED:COMPLETED"
    errors = [f.read_text(encoding="utf-8") for f in (network.kits / "site-1").rglob("*log.txt")]
    assert any("subprocess.Popen' at config path" in text and "not in allow_list" in text for text in errors)


def test_a_member_may_look_and_not_submit(network, small_base, tmp_path):
    member = network.kits / "member@trial.org"
    assert "site site-1" in unfed("network", "status", "--kit", member, cwd=network.place).stdout
    job = job_folder(network, small_base, tmp_path)
    with pytest.raises(UnfedError, match="may not do that"), network.session(member) as opened:
        opened.submit_job(str(job))


def let_in(network, certificate: Path | None = None, key: Path | None = None) -> bool:
    """Whether the server speaks with somebody who has this certificate, or none."""
    context = ssl.create_default_context(cafile=str(network.kits / "site-1" / "startup" / "rootCA.pem"))
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    try:
        raw = socket.create_connection(("127.0.0.1", network.port), 5)
        with raw, context.wrap_socket(raw, server_hostname="localhost") as tls:
            tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            return tls.recv(1) != b""
    except (ssl.SSLError, ConnectionError):
        return False


def test_a_stranger_without_a_certificate_is_refused(network):
    own = network.kits / "site-1" / "startup"
    assert let_in(network, own / "client.crt", own / "client.key"), "a site is not"
    assert not let_in(network)


def test_a_stranger_with_a_self_signed_certificate_is_refused(network, tmp_path):
    certificate, key = tmp_path / "client.crt", tmp_path / "client.key"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/O=unfed/CN=site-1"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    assert not let_in(network, certificate, key)


def test_a_stranger_with_certificates_of_a_ca_of_his_own_is_refused(network, tmp_path):
    other = Network(tmp_path, network.port)  # the same names; only the CA is another
    with pytest.raises(UnfedError, match=r"no session|does not accept"), network.session(other.admin):
        pass
    assert never_connects(network, other.kits / "site-4", "site-4", tmp_path)


def test_a_sites_certificate_serves_no_other_name_and_no_administrator(network, tmp_path):
    impostor = shutil.copytree(network.kits / "site-4", tmp_path / "site-4")
    person = shutil.copytree(network.admin, tmp_path / network.admin.name)
    for name in ("client.crt", "client.key"):
        shutil.copy(network.kits / "site-3" / "startup" / name, impostor / "startup" / name)
        shutil.copy(network.kits / "site-3" / "startup" / name, person / "startup" / name)
    with pytest.raises(UnfedError), network.session(person):
        pass
    assert never_connects(network, impostor, "site-4", tmp_path)


def never_connects(network: Network, kit: Path, name: str, place: Path) -> bool:
    """Whether a party tried, for twenty seconds, and is not among the connected ones."""
    (place / "data").mkdir(exist_ok=True)
    file = f"data_dir: {place}\nbase_model: {place}\ndatasets: [locuslab/TOFU]\n"
    (kit / "local" / "unfed.yml").write_text(file, encoding="utf-8")
    process = network.start(kit)
    time.sleep(20)
    there = network.connected()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return name not in there and set(SITES) <= there


def test_a_run_whose_server_is_killed_goes_on_from_its_last_round_to_the_same_adapter(network, finetuned):
    given = (finetuned, "forget_split=forget01", "trainer.method_args.global_rounds=60")
    job = network.submit("--detach", "task_name=long", *given).stdout.split()[1]
    run = network.place / "saves" / "finetune" / "long"
    until = time.monotonic() + 240
    while not list((run / "checkpoints").glob("round_0000[2-9]")) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in processes("runner_process", job):
        os.kill(pid, signal.SIGKILL)
    before = max(int(d.name[-5:]) for d in (run / "checkpoints").glob("round_*"))
    assert 2 <= before < 60
    unfed("network", "abort", "--kit", network.admin, job, cwd=network.place, check=False)
    done = network.submit("task_name=long", *given, "resume=true")
    assert "resuming after round" in done.stdout
    assert len(read_json(run / "run.json")["rounds"]) == 60
    manifest, here = "partition.manifest=saves/finetune/net/partition.json", "paths.data_dir=data"
    unfed("train", *TRAINING, *given, "task_name=whole", manifest, here, cwd=network.place)
    assert network.weights("finetune/long") == network.weights("finetune/whole")


def test_a_wire_with_memory_and_control_variates_give_the_adapter_of_a_run_in_one_place(network, finetuned):
    given = (finetuned, "forget_split=forget01", "trainer.method_args.global_rounds=3", "aggregator=Scaffold")
    given = (*given, "wire=topk", "wire.down=bfloat16")
    network.submit("task_name=packed", *given)
    manifest, here = "partition.manifest=saves/finetune/packed/partition.json", "paths.data_dir=data"
    unfed("train", *TRAINING, *given, "task_name=packed_here", manifest, here, cwd=network.place)
    assert network.weights("finetune/packed") == network.weights("finetune/packed_here")
    kept = {f.parent.name for f in (network.kits / "site-1" / "state").rglob("*.safetensors")}
    assert "wire" in kept and len(kept) == 2
