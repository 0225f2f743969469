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
    from unfed.base.errors import ConfigError
    from unfed.config.project import read_project

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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "holds no settings"),
        (b"name: \xff\xfe\n", "is not valid YAML: 'utf-8' codec"),
        (b"a: " + b"[" * 3000, "is not valid YAML"),
        (b"port: 1" + b"0" * 5000, "is not valid YAML"),
        (b"prot: 1", r"prot: no such setting; did you mean 'port'\? \(choices: admins"),
        (b"port: 0", "port=0: must be from 1 to 65535"),
        (b"port: 65536", "port=65536: must be from 1 to 65535"),
        (b"host: 'https://x.org:80'", "host='https://x.org:80': must be the name of a machine"),
        (b"host: ''", "host='': must be the name of a machine"),
        (b"sites: [a.b]", "'a.b' is no name of a site"),
        (b"sites: [server]", "server is the server's name in every job"),
        (b"sites: [a, A]", "A stands there twice"),
        (b"sites: [%s]" % (b"a" * 65), "at most 64 characters, and this one 65"),
        (b"organisations: {sote: x}\nsites: [site]", r"organisations: sote is no party; did you mean 'site'\?"),
        (b"organisations: {s: 'a b'}", "organisations: 'a b' is no name"),
    ],
)
def test_a_project_that_cannot_be_is_refused_before_anything_is_made(text, words, tmp_path):
    from unfed.base.errors import ConfigError
    from unfed.config.project import read_project

    file, given = tmp_path / "PROJECT.yml", {b"name": b"n", b"host": b"h", b"sites": b"[s]"}
    lacking = [k + b": " + v for k, v in given.items() if text and not any(p.startswith(k) for p in text.split(b"\n"))]
    file.write_bytes(b"\n".join([*(lacking if b"\xff" not in text else []), text]))
    with pytest.raises(ConfigError, match=words):
        read_project(file)


def test_certificates_are_not_put_among_other_files(tmp_path, capsys):
    """The workspace becomes private: somebody's home, or /tmp, must not."""
    pytest.importorskip("nvflare")
    project, other = tmp_path / "PROJECT.yml", tmp_path / "other"
    project.write_text("name: n\nhost: h\nsites: [s]\n", encoding="utf-8")
    other.mkdir(mode=0o755)
    (other / "mine").write_text("x", encoding="utf-8")
    for place, words in ((other, "holds other files"), (project, "File exists"), (project / "x", "Not a directory")):
        assert main(["provision", str(project), "--workspace", str(place)]) == 2
        assert words in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
    assert other.stat().st_mode & 0o777 == 0o755 and [f.name for f in other.iterdir()] == ["mine"]


def test_a_kit_that_was_damaged_is_named_and_left_as_it_is(tmp_path, capsys):
    pytest.importorskip("nvflare")
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    files = {
        "startup/fed_client.json": "{}",
        "local/unfed.yml": "data_dir: d\nbase_model: b\ndatasets: [x]\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert main(["start", str(tmp_path)]) == 2
    assert "sub_start.sh cannot be read" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
    (tmp_path / "startup" / "sub_start.sh").write_text("uid=a org=b", encoding="utf-8")
    for text in (None, "{nope", "[]", '{"components": [{}]}'):
        if text is not None:
            (tmp_path / "local" / "resources.json").write_text(text, encoding="utf-8")
        assert main(["start", str(tmp_path)]) == 2
        assert "resources.json" in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kit"], "argument --kit: expected one argument"),
        (["--detach=3"], "argument --detach: ignored explicit argument '3'"),
        (["--sites", "a,,b"], "--sites=a,,b: must be names of sites"),
        (["--sites", "a,a"], "--sites=a,a: must be names of sites"),
        (["--sites="], "--sites=: must be names of sites"),
    ],
)
def test_a_wrong_submit_is_one_line_before_anybody_is_waited_for(argv, words, capsys):
    pytest.importorskip("nvflare")
    assert main(["submit", *argv]) == 2
    assert words in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("largest_payload: .nan", "largest_payload=nan: must be at least 0.01 MB"),
        ("largest_payload: .inf", "largest_payload=inf: must be at least 0.01 MB, and finite"),
        ("largest_payload: 0", "largest_payload=0: must be at least 0.01 MB"),
        ("smallest_share: 0", "smallest_share=0: must be at least 1"),
        ("tasks: []", "name one each at least"),
        ("smallest: 3", r"no such setting; did you mean 'smallest_share'\? \(choices: base_model"),
        ("smallest_share: 1" + "0" * 5000, "is not valid YAML"),
    ],
)
def test_a_sites_file_with_settings_that_do_nothing_is_refused(line, words, tmp_path):
    from unfed.base.errors import ConfigError
    from unfed.config.site import SiteFile, read_site_file

    file = tmp_path / "local" / "unfed.yml"
    file.parent.mkdir()
    file.write_text(f"data_dir: d\nbase_model: b\ndatasets: [x]\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_site_file(file, SiteFile)
