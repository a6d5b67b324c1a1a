"""A token from its making to a query over TLS, as the README's commands have it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import trustme

from serving import TASK_SPEC

from ..conftest import COMMAND
from .conftest import invoke


def test_a_token_that_the_command_made_opens_a_server_with_tls(
    tiny_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    leaf = authority.issue_cert("127.0.0.1")
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    made = invoke(["token", "--name", "alice", "--read", "tiny"])
    token = made.stderr.splitlines()[1]
    assert token not in made.stdout
    (tmp_path / "token").write_text(token + "\n")
    config, ready, log = tmp_path / "serve.toml", tmp_path / "ready", tmp_path / "log"
    config.write_text(
        f"indices = [{{ path = '{tiny_index}', task = '{TASK_SPEC}' }}]\nport = 0\nhost = '0.0.0.0'\n"
        f"tls = {{ certificate = '{tmp_path}/cert.pem', key = '{tmp_path}/key.pem' }}\n{made.stdout}"
    )
    checked = invoke(["serve", "--config", config, "--check-config"])
    assert checked.exit_code == 0, checked.stderr
    assert "token alice" in checked.stdout
    serve = [*COMMAND, "serve", "--config", str(config), "--ready-file", str(ready)]
    with log.open("wb") as output, subprocess.Popen(serve, stdout=output, stderr=output) as child:
        try:
            deadline = time.monotonic() + 120
            while not ready.exists():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            server = f"127.0.0.1:{json.loads(ready.read_text())['port']}"
            query = ["query", "--server", server, "--id", "tiny-0", "--json", "--ca", tmp_path / "ca.pem"]
            refused = invoke(query)
            assert refused.exit_code == 1
            assert "this server wants a token" in refused.stderr
            assert json.loads(invoke([*query, "--token-file", tmp_path / "token"]).stdout)["index"] == "tiny"
            monkeypatch.setenv("LOOPSWAY_TOKEN", token)
            assert invoke(query).exit_code == 0
        finally:
            child.terminate()
    assert token not in log.read_text()


def test_a_token_is_not_sent_in_plaintext_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSWAY_TOKEN", "secret")
    result = invoke(["query", "--server", "example.org:50051", "--id", "a"])
    assert result.exit_code == 2
    assert "unencrypted" in result.stderr
    assert "secret" not in result.stderr


def test_a_token_without_a_proper_name_is_a_usage_error() -> None:
    assert invoke(["token", "--name", "a b"]).exit_code == 2
