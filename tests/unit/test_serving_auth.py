import hmac
import stat

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_worker.serving import auth
from trunkline_worker.serving.auth import ACCESS, Principal, Role, Tokens, authorise, create_token_file
from trunkline_worker.serving.gateway import SERVICES, Listener

GET_INFO = "/trunkline_wire.v1.CatalogService/GetServerInfo"
SUBMIT = "/trunkline_wire.v1.TrainingService/SubmitJob"


def test_every_rpc_of_the_wire_has_a_row_in_the_access_table():
    served = {f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods}
    others = {name for name in ACCESS if not name.startswith("/trunkline_wire.")}
    assert served == set(ACCESS) - others
    assert others == {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.health.v1.Health/List",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
    assert {name for name, role in ACCESS.items() if role is Role.ANYONE} == {
        name for name in others if "Health" in name
    }


def test_a_method_without_a_row_is_refused_even_with_a_token():
    tokens = Tokens([("0123456789abcdef", Principal("default", Role.USER))])
    with pytest.raises(WireError) as caught:
        authorise("/trunkline_wire.v1.CatalogService/Nothing", "Bearer 0123456789abcdef", tokens)
    assert caught.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer ", "Bearer wrong-token-00000", "0123456789abcdef", "Basic 0123456789abcdef"]
)
def test_no_token_and_a_wrong_one_are_unauthenticated(value):
    tokens = Tokens([("0123456789abcdef", Principal("default", Role.USER))])
    with pytest.raises(WireError) as caught:
        authorise(GET_INFO, value, tokens)
    assert caught.value.code is ErrorCode.UNAUTHENTICATED


def test_a_reader_may_look_but_not_train():
    tokens = Tokens([("0123456789abcdef", Principal("team", Role.READER))])
    assert authorise(GET_INFO, "Bearer 0123456789abcdef", tokens).tenant == "team"
    with pytest.raises(WireError) as caught:
        authorise(SUBMIT, "Bearer 0123456789abcdef", tokens)
    assert caught.value.code is ErrorCode.PERMISSION_DENIED


def test_every_token_is_compared_in_constant_time(monkeypatch):
    seen = []

    def compare(one, other):
        seen.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    class Hmac:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(auth, "hmac", Hmac)
    tokens = Tokens([(f"token-number-{index:05}", Principal("default", Role.USER)) for index in range(3)])
    assert tokens.find("token-number-00000") is not None
    assert tokens.find("short") is None
    assert seen == [(32, 32)] * 6  # no early end, and hashes, so that lengths tell nothing


def test_a_token_file_is_made_once_and_for_its_owner_only(tmp_path):
    path = tmp_path / "deep" / "token"
    token = create_token_file(path)
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert create_token_file(path) == token


def test_token_files_name_tenants_and_roles(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# who may come in\n0123456789abcdef\nfedcba9876543210 team-b reader  # CI\n\n")
    tokens = Tokens.read(path)
    assert len(tokens) == 2
    assert tokens.find("0123456789abcdef") == Principal("default", Role.USER)
    assert tokens.find("fedcba9876543210") == Principal("team-b", Role.READER)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no token"),
        ("short", "16 characters"),
        ("0123456789abcdef a b c", "expected"),
        ("0123456789abcdef a admin", "not 'reader' or 'user'"),
        ("0123456789abcdef ../x", "not a tenant name"),
    ],
)
def test_a_bad_token_file_is_refused_with_the_line(tmp_path, text, what):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises((ValueError, WireError), match=what):
        Tokens.read(path)


@pytest.mark.parametrize(
    ("listener", "what"),
    [
        (Listener(), "token file"),
        (Listener(host="0.0.0.0", token_file="t"), "needs TLS"),
        (Listener(host="example.org", token_file="t"), "needs TLS"),
        (Listener(token_file="t", tls_cert="c"), "both a certificate and its key"),
        (Listener(token_file="t", tls_client_ca="c"), "need TLS"),
    ],
)
def test_a_listener_that_is_open_to_strangers_is_refused(listener, what):
    with pytest.raises(ValueError, match=what):
        listener.check()


@pytest.mark.parametrize(
    "listener",
    [
        Listener(token_file="t"),
        Listener(host="::1", token_file="t"),
        Listener(host="localhost", token_file="t"),
        Listener(host="0.0.0.0", token_file="t", tls_cert="c", tls_key="k"),
        Listener(host="0.0.0.0", insecure=True),
    ],
)
def test_a_safe_listener_and_an_explicit_insecure_one_are_taken(listener):
    listener.check()
