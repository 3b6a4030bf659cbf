"""Settings: who wins, where they came from, and what never travels."""

import pytest
from trunkline import errors
from trunkline.config import check_address, is_loopback, resolve, split_address
from trunkline_wire.local import LocalCluster, write_local_cluster

SECRET = "a-very-secret-token"


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    for name in (
        "ADDRESS",
        "TOKEN",
        "TOKEN_FILE",
        "CA_FILE",
        "INSECURE",
        "PROFILE",
        "TIMEOUT_S",
        "DIRECT",
        "CACHE_DIR",
    ):
        monkeypatch.delenv(f"TRUNKLINE_{name}", raising=False)
    monkeypatch.setenv("TRUNKLINE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("TRUNKLINE_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def local(tmp_path):
    """Write the local cluster's file."""
    (tmp_path / "local-token").write_text("local-token\n")
    write_local_cluster(LocalCluster("127.0.0.1:7000", str(tmp_path / "local-token"), "", 1, "x"))


@pytest.fixture
def profiles(tmp_path):
    """Write config.toml."""
    (tmp_path / "profile-token").write_text("profile-token\n")
    (tmp_path / "config.toml").write_text(
        f"""
default = "work"
[profiles.work]
address = "work.example:443"
token_file = "{tmp_path}/profile-token"
timeout_s = 5
[profiles.lab]
address = "lab.example"
token = "lab-token"
insecure = true
"""
    )


def test_local_cluster_is_found(local):
    settings = resolve()
    assert (settings.address, settings.token, settings.tls) == ("127.0.0.1:7000", "local-token", False)
    assert settings.sources["address"] == "local cluster" and "local-token" in settings.sources["token"]


def test_nothing_is_found():
    with pytest.raises(errors.ServiceUnavailableError, match="trunkline up"):
        resolve()


def test_profile_before_local_cluster(local, profiles):
    settings = resolve()
    assert (settings.address, settings.token, settings.timeout_s) == ("work.example:443", "profile-token", 5.0)
    assert settings.tls and "profile 'work'" in settings.sources["address"]


def test_variable_before_profile(local, profiles, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_ADDRESS", "env.example:1")
    monkeypatch.setenv("TRUNKLINE_TOKEN", "env-token")
    monkeypatch.setenv("TRUNKLINE_TIMEOUT_S", "7")
    settings = resolve()
    assert (settings.address, settings.token, settings.timeout_s) == ("env.example:1", "env-token", 7.0)
    assert settings.sources["token"] == "TRUNKLINE_TOKEN"


def test_argument_before_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("TRUNKLINE_ADDRESS", "env.example:1")
    monkeypatch.setenv("TRUNKLINE_TOKEN", "env-token")
    (tmp_path / "t").write_text("file-token")
    settings = resolve("arg.example:2", token_file=tmp_path / "t", timeout_s=3)
    assert (settings.address, settings.token, settings.timeout_s) == ("arg.example:2", "file-token", 3.0)
    assert resolve("arg.example:2", token="").token == ""
    monkeypatch.delenv("TRUNKLINE_TOKEN")
    monkeypatch.setenv("TRUNKLINE_TOKEN_FILE", str(tmp_path / "t"))
    assert resolve().token == "file-token"


def test_named_profile(profiles, monkeypatch):
    assert resolve(profile="lab").address == "lab.example:50051"
    monkeypatch.setenv("TRUNKLINE_PROFILE", "lab")
    assert resolve().token == "lab-token" and not resolve().tls
    assert resolve(profile="work").token == "profile-token"


def test_a_token_does_not_follow_another_address(local, profiles):
    """Neither the profile's token nor the local cluster's is meant for whoever is named on the command line."""
    assert resolve("stranger.example:443").token == ""
    assert resolve("stranger.example", profile="lab").token == ""
    assert resolve("stranger.example", profile="lab").tls
    assert resolve("lab.example:50051", profile="lab").token == "lab-token"
    assert resolve("127.0.0.1:7000").token == "local-token"
    assert resolve("127.0.0.1:7001").token == ""


@pytest.mark.parametrize(
    ("address", "keywords", "tls"),
    [
        ("127.0.0.1:1", {}, False),
        ("localhost:1", {}, False),
        ("[::1]:1", {}, False),
        ("10.0.0.1:1", {}, True),
        ("cluster.example:1", {}, True),
        ("cluster.example:1", {"insecure": True}, False),
        ("localhost.evil.example:1", {}, True),
    ],
)
def test_plaintext_only_here_or_on_demand(address, keywords, tls):
    assert resolve(address, token=SECRET, **keywords).tls is tls


def test_certificate_turns_tls_on(tmp_path):
    (tmp_path / "ca.pem").write_text("x")
    assert resolve("127.0.0.1:1", ca_file=tmp_path / "ca.pem").tls
    assert resolve("far.example:1", ca_file=tmp_path / "ca.pem", insecure=True).tls
    with pytest.raises(errors.ConfigError, match="no certificate file"):
        resolve("127.0.0.1:1", ca_file=tmp_path / "missing.pem")


def test_secrets_are_not_shown(profiles):
    settings = resolve("127.0.0.1:1", token=SECRET)
    assert SECRET not in repr(settings) and SECRET not in str(settings.describe())
    assert ("token", f"({len(SECRET)} characters, hidden)", "argument") in settings.describe()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not toml =", "cannot be read"),
        ("default = 'gone'", "no profile 'gone'"),
        ("default='a'\n[profiles.a]\nadress='x'", "unknown settings: adress"),
        ("default='a'\n[profiles.a]\naddress=3", "must be a str"),
        ("default='a'\n[profiles.a]\naddress='x'\ninsecure='yes'", "must be a bool"),
        ("default='a'\n[profiles.a]\naddress='x'\ndirect='yes'", "must be a bool"),
        ("default='a'\n[profiles.a]\naddress='x'\ntimeout_s=true", "must be a float"),
        ("default='a'\n[profiles.a]\naddress='x'\ntimeout_s=-1", "positive"),
        ("default='a'\n[profiles.a]\naddress='x y'", "not an address"),
    ],
)
def test_bad_file(tmp_path, text, said):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(errors.ConfigError, match=said):
        resolve()


def test_missing_profile():
    with pytest.raises(errors.ConfigError, match="no profile 'lab'"):
        resolve(profile="lab")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TRUNKLINE_INSECURE", "perhaps", "true or false"),
        ("TRUNKLINE_TIMEOUT_S", "soon", "positive number"),
        ("TRUNKLINE_TIMEOUT_S", "inf", "positive number"),
        ("TRUNKLINE_TOKEN_FILE", "/no/such/file", "cannot be read"),
        ("TRUNKLINE_TOKEN", "two words", "spaces"),
    ],
)
def test_bad_variables(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(errors.ConfigError, match=said) as caught:
        resolve("127.0.0.1:1")
    assert name != "TRUNKLINE_TOKEN" or value not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [("h", "h:50051"), ("h:1", "h:1"), (" h:1 ", "h:1"), ("[::1]", "[::1]:50051"), ("[::1]:9", "[::1]:9")],
)
def test_addresses(text, address):
    assert check_address(text, "test") == address


@pytest.mark.parametrize("text", ["", "h:0", "h:65536", "h:x", "::1", "http://h:1", "a b:1", "[::1", "h:1:2"])
def test_what_is_no_address(text):
    with pytest.raises(errors.ConfigError):
        check_address(text, "test")


def test_parts_of_an_address():
    assert split_address("[::1]:9") == ("::1", 9) and split_address("h:1") == ("h", 1)
    assert is_loopback("127.9.9.9:1") and is_loopback("[::1]:1")
    assert not is_loopback("0.0.0.0:1") and not is_loopback("[fe80::1]:1")


def test_direct(monkeypatch, tmp_path):
    (tmp_path / "config.toml").write_text("[profiles.far]\naddress = 'far.example'\ndirect = false\n")
    assert resolve("127.0.0.1:1").direct and resolve("127.0.0.1:1").sources["direct"] == "default"
    assert not resolve(profile="far").direct and "profile 'far'" in resolve(profile="far").sources["direct"]
    monkeypatch.setenv("TRUNKLINE_DIRECT", "on")
    assert resolve(profile="far").direct
    monkeypatch.setenv("TRUNKLINE_DIRECT", "0")
    assert not resolve("127.0.0.1:1").direct and resolve("127.0.0.1:1", direct=True).direct
    assert ("direct", "False", "TRUNKLINE_DIRECT") in resolve("127.0.0.1:1").describe()
    monkeypatch.setenv("TRUNKLINE_DIRECT", "maybe")
    with pytest.raises(errors.ConfigError, match="TRUNKLINE_DIRECT is 'maybe'"):
        resolve("127.0.0.1:1")
