"""``unfed network`` on a machine without NVFlare, and with mistakes that need none."""

from __future__ import annotations

import base64
import importlib.util
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from unfed.cli.network import COMMANDS, main


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_without_nvflare_every_command_says_what_to_install(command, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "nvflare" else found(name, *a))
    assert main([command, "anything"]) == 2
    assert "pip install 'unfed[network]'" in capsys.readouterr().err


def test_help_and_a_wrong_command_need_nothing(capsys):
    assert main([]) == main(["status", "--help"]) == 0
    assert main(["stauts"]) == 2
    assert "no such command" in (err := capsys.readouterr().err) and "status" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["logs"], "unfed network logs: the following arguments are required: job"),
        (["abort", "--kti", "x", "job"], "--kti is not understood; did you mean '--kit'?"),
        (["status", "a", "b"], "unfed network status: b is not understood"),
        (["status", "--kit", "nowhere"], "nowhere is no startup kit"),
        (["status"], "--kit: the folder of an administrator's startup kit is needed"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, words, monkeypatch, capsys):
    pytest.importorskip("nvflare")
    monkeypatch.delenv("UNFED_KIT", raising=False)
    assert main(argv) == 2
    assert words in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


def test_certificates_last_at_most_as_long_as_nvflares(tmp_path):
    from unfed.app.network import read_project
    from unfed.base.errors import ConfigError

    file = tmp_path / "PROJECT.yml"
    for days in (0, 361):
        file.write_text(f"name: n\nhost: h\nsites: [s]\nvalid_days: {days}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=f"valid_days={days}: must be from 1 to 360"):
            read_project(file)


def kit_until(place, days):
    """An administrator's kit whose certificates end in ``days`` days."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin@n.org")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=90)).not_valid_after(now + timedelta(days=days, hours=1))
    text = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (place / "startup").mkdir(parents=True)
    (place / "startup" / "fed_admin.json").write_text("{}", encoding="utf-8")
    for file in ("rootCA.pem", "client.crt"):
        (place / "startup" / file).write_bytes(text)
    return place


def test_certificates_that_end_soon_are_told_and_ended_ones_refused(tmp_path, capsys):
    from unfed.app.network import check_validity

    assert check_validity(kit_until(tmp_path / "long", 200)) is None
    assert "in 10 days; the operator renews" in str(check_validity(kit_until(tmp_path / "soon", 10)))
    pytest.importorskip("nvflare")
    assert main(["status", "--kit", str(kit_until(tmp_path / "past", -3))]) == 2
    assert "ended on" in (err := capsys.readouterr().err) and "docs/network.md, Renewal" in err


def test_what_a_site_receives_is_not_spelled_out():
    """NVFlare formats it for a debug line, whatever the level."""
    buffers = pytest.importorskip("nvflare.fuel.utils.buffer_list")
    import unfed.federated.nvflare  # noqa: F401

    assert str(buffers.ConsumableBufferList([bytes(1000), bytes(10)])) == "<2 pieces>"


def test_a_job_that_begins_without_one_of_its_sites_is_refused(small_run, tmp_path, monkeypatch, caplog):
    pytest.importorskip("nvflare")
    from unfed.app import nvflare_app
    from unfed.app.rundir import plain
    from unfed.base.errors import UnfedError
    from unfed.federated import nvflare as nvflare_link

    there = [SimpleNamespace(name="site-2"), SimpleNamespace(name="site-1")]
    (tmp_path / "unfed.yml").write_text(f"outputs: {tmp_path}\n", encoding="utf-8")
    place = SimpleNamespace(get_site_config_dir=lambda: str(tmp_path))
    for module in (nvflare_app, nvflare_link):
        monkeypatch.setattr(module, "collab", SimpleNamespace(clients=there, workspace=place, is_aborted=False))
    config = base64.b64encode(json.dumps(plain(small_run("finetune", tmp_path / "run"))).encode()).decode()
    with pytest.raises(UnfedError, match="site-3, site-4: gone when the job began"):
        nvflare_app.Server(config, ["site-1", "site-2", "site-3", "site-4"]).run()
    assert "error: site-3, site-4" in caplog.text and not (tmp_path / "run").exists()
