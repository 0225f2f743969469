"""``unfed network`` on a machine without NVFlare, and with mistakes that need none."""

from __future__ import annotations

import importlib.util

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
