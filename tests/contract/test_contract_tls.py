"""TLS: trusted, expired, unknown, missing; and that a token never travels in the clear by accident."""

import datetime
import ipaddress
import socket
import threading

import pytest
import trunkline
from fake_worker import FakeWorker
from trunkline.config import resolve
from trunkline.doctor import examine


def certificate(days):
    """Make a key and a self-signed certificate that ends in so many days, in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, made.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def secure(request, tmp_path):
    """Start a worker with TLS; the parameter is how many days its certificate lasts."""
    key, cert = certificate(getattr(request, "param", 100))
    path = tmp_path / "ca.pem"
    path.write_bytes(cert)
    with FakeWorker(tls=(key, cert)) as worker:
        worker.ca_file = str(path)
        yield worker


def checks(worker, **keywords):
    found = examine(lambda: resolve(worker.address, token=worker.token, **keywords))
    return {one.name: one for one in found}


def test_trusted(secure):
    with trunkline.connect(secure.address, token=secure.token, ca_file=secure.ca_file) as client:
        assert client.settings.tls and client.backbones()
    found = checks(secure, ca_file=secure.ca_file)
    assert found["tls"].status == "ok" and "days left" in found["tls"].detail
    assert found["login"].status == found["health"].status == "ok"


@pytest.mark.parametrize("secure", [-1], indirect=True)
def test_expired(secure):
    with pytest.raises(trunkline.TlsError, match="expired"):
        trunkline.connect(secure.address, token=secure.token, ca_file=secure.ca_file)
    found = checks(secure, ca_file=secure.ca_file)["tls"]
    assert found.status == "fail" and "expired" in found.detail and "renew" in found.fix


@pytest.mark.parametrize("secure", [3], indirect=True)
def test_about_to_expire(secure):
    found = checks(secure, ca_file=secure.ca_file)["tls"]
    assert found.status == "warn" and "renew" in found.fix


def test_not_trusted(secure, tmp_path):
    other = tmp_path / "other.pem"
    other.write_bytes(certificate(100)[1])
    with pytest.raises(trunkline.TlsError, match="not trusted"):
        trunkline.connect(secure.address, token=secure.token, ca_file=other)
    found = checks(secure, ca_file=other)["tls"]
    assert found.status == "fail" and "TRUNKLINE_CA_FILE" in found.fix


def test_other_side_without_tls(fake, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_bytes(certificate(100)[1])
    with pytest.raises(trunkline.TlsError):
        trunkline.connect(fake.address, token=fake.token, ca_file=path)
    assert not fake.request_ids
    found = checks(fake, ca_file=path)["tls"]
    assert found.status == "fail" and "does not speak TLS" in found.detail


def test_plaintext_to_a_server_with_tls(secure):
    with pytest.raises(trunkline.ServiceUnavailableError):
        trunkline.connect(secure.address, token=secure.token)


def test_token_is_not_sent_in_the_clear(monkeypatch):
    """A server by a name that is not this machine's gets a TLS handshake and nothing else."""
    received = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def take():
            connection, _ = listener.accept()
            with connection:
                received.append(connection.recv(4096))

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        monkeypatch.setattr("trunkline.config.is_loopback", lambda address: False)
        with pytest.raises(trunkline.TrunklineError):
            trunkline.connect(f"127.0.0.1:{port}", token="a-secret-token", timeout_s=2.0)
        thread.join(60)
    assert received and received[0][:1] == b"\x16"  # the record type of a TLS handshake
    assert b"a-secret-token" not in received[0]
