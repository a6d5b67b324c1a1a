"""Who may ask what: tokens, scopes, rates, and TLS with real certificates; and no secret in a log or an error."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loopsway.client import (
    AsyncClient,
    AuthenticationError,
    Client,
    ExampleQuery,
    InfluenceResult,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    SketchQuery,
    Tls,
    UnavailableError,
)
from loopsway.indexer import Index
from loopsway.service import Settings, SettingsError, TlsSettings, TokenSettings, check_settings
from loopsway.service.authentication import SCOPES
from loopsway.service.catalog import Catalog
from loopsway.service.errors import RateError
from loopsway.service.tokens import Tokens, digest, new_token
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import QUERIES, Served, commanded, running, wait_for, without_model

READER, STRANGER, SLOW, ADMIN = new_token(), new_token(), new_token(), new_token()
TOKENS = (
    TokenSettings(name="reader", sha256=digest(READER), read=("tiny",)),
    TokenSettings(name="stranger", sha256=digest(STRANGER), read=("other",)),
    TokenSettings(name="slow", sha256=digest(SLOW), read=("*",), requests_per_second=0.5, burst=2),
    TokenSettings(name="admin", sha256=digest(ADMIN), read=("other",), admin=("tiny",)),
)


class Files:
    """A server's certificate in files."""

    def __init__(self, folder: Path, authority: trustme.CA) -> None:
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.write(authority)

    def write(self, authority: trustme.CA) -> None:
        leaf = authority.issue_cert("127.0.0.1", "localhost")
        leaf.cert_chain_pems[0].write_to_path(str(self.cert))
        leaf.private_key_pem.write_to_path(str(self.key))

    def settings(self, *, client_ca: bool = False) -> TlsSettings:
        return TlsSettings(certificate=self.cert, key=self.key, client_ca=self.ca if client_ca else None)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Files:
    return Files(tmp_path, authority)


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Served]) -> Served:
    return serve(tokens=TOKENS, aliases={"live": "tiny"})


@contextmanager
def serving(index_path: Path, settings: Settings) -> Iterator[str]:
    indices = (without_model(index_path),)
    with running(settings.model_copy(update={"indices": indices})) as (_, port):
        yield f"127.0.0.1:{port}"


def test_every_method_of_the_service_has_a_scope() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods:
        assert SCOPES.get(f"/{service.full_name}/{method.name}") in ("read", "admin"), method.name


@pytest.mark.parametrize("token", [None, new_token(), READER[:-1], "x" * 1000])
def test_without_a_known_token_nothing_is_answered(guarded: Served, token: str | None) -> None:
    with Client(guarded.target, token=token) as client:
        for ask in (client.list_indices, client.get_index, lambda: list(client.score_examples([]))):
            with pytest.raises(AuthenticationError) as caught:
                ask()
            assert token is None or token not in str(caught.value)


async def test_a_known_token_is_answered_by_both_clients(guarded: Served) -> None:
    query = ExampleQuery(QUERIES[0])
    with Client(guarded.target, token=READER) as client:
        assert [(index.name, index.aliases) for index in client.list_indices()] == [("tiny", ("live",))]
        assert client.find_influences([query], k=1)
        assert list(client.score_examples([query]))
    async with AsyncClient(guarded.target, token=READER) as other:
        assert (await other.get_index()).name == "tiny"
        assert [chunk async for chunk in other.score_examples([query])]


def test_an_index_that_is_not_allowed_is_hidden_and_refused(guarded: Served) -> None:
    with Client(guarded.target, token=STRANGER) as client:
        assert client.list_indices() == []
        for name in ("tiny", "nowhere", "live"):  # which of them exists, and what it stands for, can't be told
            with pytest.raises(PermissionDeniedError, match=f"token stranger has no scope 'read' for index '{name}'"):
                client.get_index(name)


def test_whoever_may_use_an_index_may_by_its_alias_and_no_scope_is_for_an_alias(
    guarded: Served, index_path: Path
) -> None:
    with Client(guarded.target, token=READER) as client:
        assert client.get_index("live").name == "tiny"
    for scope in ("read", "admin"):
        token = {"name": "mover", "sha256": digest(READER), scope: ("live",)}
        settings = Settings(indices=[without_model(index_path)], aliases={"live": "tiny"}, tokens=[token])
        for refuse in (check_settings, Catalog):
            with pytest.raises(SettingsError, match=r"token mover has a scope for live, an alias.*: give it tiny"):
                refuse(settings)


def test_only_the_scope_admin_of_the_very_index_lets_it_be_reloaded(guarded: Served) -> None:
    scopes = {name for name, scope in SCOPES.items() if scope == "admin"}
    assert scopes == {"/loopsway.v1.Attribution/ReloadIndex"}
    for token, name, index in ((READER, "reader", "tiny"), (SLOW, "slow", "tiny"), (ADMIN, "admin", "other")):
        with (
            Client(guarded.target, token=token) as client,
            pytest.raises(PermissionDeniedError, match=f"token {name} has no scope 'admin' for index '{index}'"),
        ):
            client.reload_index(index)
    with Client(guarded.target, token=READER) as client, pytest.raises(PermissionDeniedError, match="for any index"):
        client.reload_index()
    with Client(guarded.target, token=ADMIN) as client:
        for name in ("", "tiny"):
            assert client.reload_index(name).generation == 1
        assert [index.name for index in client.list_indices()] == ["tiny"], "who may change may read"


def written(config: Path, index_path: Path, tokens: dict[str, tuple[str, str]], *, more: str = "") -> None:
    """A settings file with these tokens, by name, and the index that each may ask."""
    text = f"port = 0\nindices = [{{path = '{index_path}', model = false}}]\n{more}\n"
    for name, (token, read) in tokens.items():
        text += f"[[tokens]]\nname = '{name}'\nsha256 = '{digest(token)}'\nread = ['{read}']\n"
    config.write_text(text)


def test_sighup_revokes_tokens_and_lets_new_ones_in(index_path: Path, index: Index, tmp_path: Path) -> None:
    config, log = tmp_path / "serve.toml", tmp_path / "log"
    alice, bob, carol = new_token(), new_token(), new_token()
    written(config, index_path, {"alice": (alice, "tiny"), "bob": (bob, "tiny")})
    with commanded(config) as (child, nobody):
        target = f"127.0.0.1:{json.loads((tmp_path / 'ready.json').read_text())['port']}"

        def shown(token: str) -> list[str]:
            with Client(target, token=token) as client:
                return [each.name for each in client.list_indices()]

        def reread(said: str) -> None:
            lines = log.read_text().count(said)
            child.send_signal(signal.SIGHUP)
            wait_for(lambda: log.read_text().count(said) > lines)

        def refused(*tokens: str) -> None:
            for token in tokens:
                with pytest.raises(AuthenticationError):
                    shown(token)
            with pytest.raises(AuthenticationError):
                nobody.list_indices()

        queries: SimpleQueue[SketchQuery | None] = SimpleQueue()
        query = SketchQuery(np.ones((3, index.width), np.float32), index.fingerprint)
        with Client(target, token=alice) as client:
            answers = client.stream_influences(iter(queries.get, None), batch=1)
            queries.put(query)
            assert isinstance(next(answers), InfluenceResult)
            written(config, index_path, {"carol": (carol, "tiny"), "bob": (bob, "other")})
            assert (shown(alice), shown(bob)) == (["tiny"], ["tiny"]), "unasked"
            reread("the tokens are carol, bob")
            queries.put(query)
            queries.put(None)
            with pytest.raises(AuthenticationError):  # a stream does not outlast its token
                next(answers)
        refused(alice)
        assert (shown(carol), shown(bob)) == (["tiny"], [])

        config.write_text("tokens = 3")
        reread("ERROR")
        written(config, index_path, {"alice": (alice, "tiny")}, more="aliases = {live = 'none'}")
        reread("the aliases and tokens stay as they are: alias live is of index none")
        refused(alice)
        assert shown(carol) == ["tiny"]

        written(config, index_path, {})
        reread("no token is left, and all callers are refused")
        refused(alice, bob, carol)
        written(config, index_path, {"alice": (alice, "tiny")})
        reread("the tokens are alice")
        refused(bob, carol)
        assert shown(alice) == ["tiny"]
    assert not any(token in log.read_text() for token in (alice, bob, carol))


def test_tokens_given_to_a_server_that_wants_none_are_an_error_in_its_log(index_path: Path, tmp_path: Path) -> None:
    config, log = tmp_path / "serve.toml", tmp_path / "log"
    written(config, index_path, {})
    with commanded(config) as (child, client):
        written(config, index_path, {"reader": (READER, "tiny")}, more="aliases = {live = 'tiny'}")
        child.send_signal(signal.SIGHUP)
        wait_for(lambda: "this server was started without any: it asks nobody for one" in log.read_text())
        assert [index.name for index in client.list_indices()] == ["tiny"]
        with pytest.raises(NotFoundError):
            client.get_index("live")


def test_a_token_that_stays_keeps_what_it_used_up_of_its_rate() -> None:
    slow = TOKENS[2]
    tokens = Tokens([slow])
    for _ in range(slow.burst):
        tokens.admit(SLOW)
    tokens.replace([slow, TOKENS[0]])
    with pytest.raises(RateError, match="token slow allows"):
        tokens.admit(SLOW)
    assert tokens.admit(READER).token == TOKENS[0]
    tokens.replace([slow.model_copy(update={"name": "fast", "requests_per_second": None})])
    assert tokens.admit(SLOW).token.name == "fast"


def test_too_many_requests_with_a_token_are_refused_with_when_to_come_back(guarded: Served) -> None:
    with Client(guarded.target, token=SLOW, overload_retries=0) as client:
        with suppress(OverloadedError):
            for _ in range(3):
                client.get_index()
        with pytest.raises(OverloadedError, match=r"token slow allows 0\.5 requests a second, 2 at once") as caught:
            client.get_index()
        assert caught.value.retry_after_s is not None
        assert 0 < caught.value.retry_after_s <= 2
    start = time.monotonic()
    with Client(guarded.target, token=SLOW) as client:
        client.get_index()
    assert time.monotonic() - start > 0.2, "the client waits for as long as the server says"


def test_each_batch_of_a_stream_counts_for_the_rate_and_waits_for_it(serve: Callable[..., Served]) -> None:
    token = new_token()
    settings = TokenSettings(name="some", sha256=digest(token), read=("*",), requests_per_second=4, burst=2)
    served = serve(model=False, tokens=(settings,))
    sketch = SketchQuery(np.ones((3, 256), np.float32), served.engine.index.fingerprint)
    with Client(served.target, token=token) as client:
        start = time.monotonic()
        answers = list(client.stream_influences([sketch] * 7, batch=1))
        seconds = time.monotonic() - start
    assert [type(answer) for answer in answers] == [InfluenceResult] * 7
    assert seconds > 1.4, "the stream and 7 batches; 2 at once and 4 a second are 1.5 s"


def test_one_token_has_at_most_half_of_the_places_of_streams(serve: Callable[..., Served]) -> None:
    served, ended = serve(model=False, tokens=TOKENS, max_streams=5), threading.Event()

    def waiting() -> Iterator[pb.StreamInfluencesRequest]:
        yield pb.StreamInfluencesRequest(tag="first")
        ended.wait(60)

    def opened(token: str) -> Any:
        call = served.stub.StreamInfluences(waiting(), metadata=(("authorization", f"Bearer {token}"),))
        assert next(call).tag == "first"
        return call

    calls = [opened(READER) for _ in range(2)]
    with pytest.raises(grpc.RpcError) as caught:
        opened(READER)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "token reader has 2 streams open, as many as one token may have"
    calls += [opened(ADMIN) for _ in range(2)]
    ended.set()
    assert [list(call) for call in calls] == [[]] * 4
    assert list(opened(READER)) == []


def test_health_is_open_and_reflection_wants_a_token(guarded: Served) -> None:
    health: Any = health_pb2_grpc.HealthStub(guarded.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    with pytest.raises(grpc.RpcError) as caught:
        list(reflection.ServerReflectionInfo(iter(requests)))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    metadata = [("authorization", f"Bearer {READER}")]
    assert list(reflection.ServerReflectionInfo(iter(requests), metadata=metadata))


def test_no_secret_is_in_a_log_or_an_error(guarded: Served, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    wrong, said = new_token(), []
    for value in (f"Bearer {READER}", f"Bearer {wrong}", f"Basic {wrong}", wrong, f"Bearer {wrong} {wrong}"):
        for method in ("GetIndex", "FindInfluences"):
            request = pb.GetIndexRequest() if method == "GetIndex" else pb.FindInfluencesRequest()
            try:
                getattr(AttributionStub(guarded.channel), method)(request, metadata=[("authorization", value)])
            except grpc.RpcError as error:
                said.append(f"{error!r} {error.details()} {error.trailing_metadata()}")
    with pytest.raises(ValueError, match="unencrypted") as caught:
        Client("example.org:50051", token=wrong)
    said.append(str(caught.value))
    with pytest.raises(ValueError, match="characters") as caught:
        Client("127.0.0.1:1", token=f"{wrong} ")
    said.append(str(caught.value))
    with pytest.raises(SettingsError) as mistaken:
        Settings(tokens=[{"name": "a", "sha256": wrong}, {"name": wrong * 2, "sha256": "ab" * 32, "red": wrong}])
    said.append(str(mistaken.value))
    text = "\n".join(said) + caplog.text
    assert len(said) == 12
    assert "UNAUTHENTICATED" in text
    for secret in (READER, wrong):
        assert secret not in text
        assert secret not in repr(Settings(tokens=TOKENS))


def test_over_tls_a_client_that_trusts_the_authority_is_answered(index_path: Path, files: Files) -> None:
    settings = Settings(port=0, grace_s=0, tls=files.settings(), tokens=TOKENS)
    with serving(index_path, settings) as target:
        with Client(target, token=READER, tls=Tls(ca=files.ca)) as client:
            assert client.get_index().name == "tiny"
        with Client(target, tls=Tls(ca=files.ca)) as client, pytest.raises(AuthenticationError):
            client.get_index()
        for tls in (None, Tls()):  # plaintext, and an authority that is not trusted
            with Client(target, tls=tls, timeout_s=5) as client, pytest.raises(UnavailableError):
                client.get_index()


def test_mutual_tls_wants_a_certificate_of_the_clients_own(
    index_path: Path, files: Files, authority: trustme.CA, tmp_path: Path
) -> None:
    own, key = tmp_path / "own.pem", tmp_path / "own.key"
    for issuer in (authority, trustme.CA()):
        leaf = issuer.issue_cert("client.example")
        leaf.cert_chain_pems[0].write_to_path(str(own))
        leaf.private_key_pem.write_to_path(str(key))
        with ExitStack() as stack:
            settings = Settings(port=0, grace_s=0, tls=files.settings(client_ca=True))
            target = stack.enter_context(serving(index_path, settings))
            client = stack.enter_context(Client(target, tls=Tls(ca=files.ca, cert=own, key=key), timeout_s=5))
            if issuer is authority:
                assert client.get_index().name == "tiny"
            else:
                with pytest.raises(UnavailableError):
                    client.get_index()
            anonymous = stack.enter_context(Client(target, tls=Tls(ca=files.ca), timeout_s=5))
            with pytest.raises(UnavailableError):
                anonymous.get_index()


def test_a_new_certificate_is_taken_and_a_damaged_one_is_not(
    index_path: Path, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "next").mkdir()
    second = trustme.CA()
    newer = Files(tmp_path / "next", second)

    def answered(ca: Path) -> bool:
        with Client(target, tls=Tls(ca=ca), timeout_s=5) as client:
            try:
                return client.get_index().name == "tiny"
            except UnavailableError:
                return False

    with serving(index_path, Settings(port=0, grace_s=0, tls=files.settings())) as target:
        assert (answered(files.ca), answered(newer.ca)) == (True, False)
        good = files.cert.read_bytes()
        for damaged in (b"", b"nonsense", good[: len(good) // 2], newer.cert.read_bytes()):
            files.cert.write_bytes(damaged)
            assert answered(files.ca), "the certificate before it stays"
        assert "the new certificate is not used" in caplog.text
        files.cert.unlink()
        assert answered(files.ca)
        files.write(second)
        assert (answered(files.ca), answered(newer.ca)) == (False, True)


def test_a_new_client_ca_lets_its_own_in_and_those_of_the_one_before_no_more(
    index_path: Path, files: Files, authority: trustme.CA, tmp_path: Path
) -> None:
    second, trusted = trustme.CA(), tmp_path / "clients.pem"
    certificates: dict[trustme.CA, Tls] = {}
    for number, issuer in enumerate((authority, second)):
        cert, key = tmp_path / f"{number}.pem", tmp_path / f"{number}.key"
        leaf = issuer.issue_cert("client.example")
        leaf.cert_chain_pems[0].write_to_path(str(cert))
        leaf.private_key_pem.write_to_path(str(key))
        certificates[issuer] = Tls(ca=files.ca, cert=cert, key=key)

    def answered(issuer: trustme.CA) -> bool:
        with Client(target, tls=certificates[issuer], timeout_s=5) as client:
            try:
                return client.get_index().name == "tiny"
            except UnavailableError:
                return False

    authority.cert_pem.write_to_path(str(trusted))
    tls = files.settings().model_copy(update={"client_ca": trusted})
    with serving(index_path, Settings(port=0, grace_s=0, tls=tls)) as target:
        assert (answered(authority), answered(second)) == (True, False)
        second.cert_pem.write_to_path(str(trusted))
        assert (answered(authority), answered(second)) == (False, True)


def test_a_check_of_settings_reads_the_certificate(index_path: Path, files: Files) -> None:
    def check(**settings: Any) -> list[str]:
        return check_settings(Settings(indices=[without_model(index_path)], **settings))

    assert any("fits its key" in line for line in check(tls=files.settings()))
    other = trustme.CA().issue_cert("127.0.0.1")
    other.private_key_pem.write_to_path(str(files.key))
    with pytest.raises(SettingsError, match="the key is another certificate's"):
        check(tls=files.settings())
    files.key.write_text("nonsense")
    with pytest.raises(SettingsError, match="they are no PEM of the two"):
        check(tls=files.settings())
    files.key.unlink()
    with pytest.raises(FileNotFoundError):
        check(tls=files.settings())


async def test_others_reach_a_server_only_with_tls_and_tokens_or_certificates(index_path: Path, files: Files) -> None:
    def check(**settings: Any) -> None:
        check_settings(Settings(host="0.0.0.0", indices=[without_model(index_path)], **settings))

    with pytest.raises(SettingsError, match=r"without TLS .* and without tokens"):
        check()
    with pytest.raises(SettingsError, match=r"without TLS \(a \[tls\] table .*: add"):
        check(tokens=TOKENS)
    with pytest.raises(SettingsError, match="without tokens"):
        check(tls=files.settings())
    check(tls=files.settings(), tokens=TOKENS)
    check(tls=files.settings(client_ca=True))
    check(insecure_bind=True)


def test_a_token_goes_in_plaintext_to_this_machine_alone() -> None:
    for target in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x", "ipv4:127.0.0.1:1"):
        Client(target, token=READER).close()
    for target in ("127.evil.example:1", "localhost.example:1", "10.0.0.1:1", "dns:///x:1", "127.0.0.1.example:1"):
        with pytest.raises(ValueError, match="unencrypted"):
            Client(target, token=READER)


def test_a_token_is_bytes_of_chance() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {46}
