"""Certificates: what they say, what is refused, and files that appear whole, secret and never over others."""

import json
import random
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blockstore.cli.main import run
from blockstore.errors import AlreadyExists, Conflict, InvalidRequest, NotFound
from blockstore.pki import certificates, directory
from blockstore.pki.certificates import Pair, describe
from blockstore.pki.uses import Use
from nbd_server.tls import peer_of

DAY = timedelta(days=1)
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority() -> Pair:
    return certificates.make_authority("Test CA", 100 * DAY, NOW)


def issue(authority: Pair, use: Use = Use.SERVER, name: str = "fe-1", hosts: tuple[str, ...] = ()) -> Pair:
    return certificates.issue(authority, use, name, hosts, lifetime=10 * DAY, now=NOW)


def test_what_a_certificate_says(authority: Pair) -> None:
    said = describe(issue(authority, Use.SERVER, "fe-1", ("a.example", "10.0.0.1", "::1", "a.example")).certificate)
    assert (said.subject, said.common_name, said.issuer, said.use) == ("CN=fe-1", "fe-1", "CN=Test CA", Use.SERVER)
    assert said.names == ("a.example", "10.0.0.1", "::1")
    assert (said.not_before, said.not_after) == (NOW - timedelta(hours=1), NOW + 10 * DAY)
    assert (said.days_left(NOW), said.days_left(NOW + 11 * DAY)) == (10, -1)
    assert describe(issue(authority, Use.CLIENT).certificate).use is Use.CLIENT
    assert describe(authority.certificate).use is Use.AUTHORITY


def test_nothing_outlives_its_authority(authority: Pair) -> None:
    long = certificates.issue(authority, Use.CLIENT, "c", (), lifetime=1000 * DAY, now=NOW)
    assert describe(long.certificate).not_after == NOW + 100 * DAY
    with pytest.raises(Conflict, match="has expired"):
        certificates.issue(authority, Use.CLIENT, "c", (), lifetime=DAY, now=NOW + 100 * DAY)


def test_who_cannot_vouch(authority: Pair) -> None:
    other = certificates.make_authority("Other CA", DAY, NOW)
    with pytest.raises(Conflict, match="do not belong together"):
        issue(Pair(authority.certificate, other.key))
    with pytest.raises(Conflict, match="is no authority"):
        issue(issue(authority))
    with pytest.raises(InvalidRequest, match="only those are renewed"):
        certificates.renew(authority, other, DAY, NOW)
    with pytest.raises(InvalidRequest, match="no certificate in PEM"):
        describe(b"-----BEGIN CERTIFICATE-----\n")


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_names_that_are_none(authority: Pair, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no name"):
        issue(authority, Use.CLIENT, name)


@pytest.mark.parametrize("host", ["", "a b", "http://x", "10.0.0.1/8", "ä ö"])
def test_hosts_that_are_none(authority: Pair, host: str) -> None:
    with pytest.raises(InvalidRequest, match="is no host's name"):
        issue(authority, Use.SERVER, "fe", (host,))


def test_renewing_keeps_key_and_names(authority: Pair) -> None:
    old = issue(authority, Use.SERVER, "fe-1", ("a.example", "10.0.0.1"))
    new = certificates.renew(authority, old, 20 * DAY, NOW + 5 * DAY)
    before, after = describe(old.certificate), describe(new.certificate)
    assert new.key == old.key
    assert (after.subject, after.names, after.use) == (before.subject, before.names, before.use)
    assert after.not_after == NOW + 25 * DAY
    assert after.serial != before.serial


def test_files_are_whole_secret_and_work_with_openssl(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    directory.init(pki, "Test CA", 10 * DAY)
    made = directory.issue(pki, Use.SERVER, "fe-1", ["localhost"], lifetime=DAY)
    assert sorted(each.name for each in pki.iterdir()) == ["ca-cert.pem", "ca-key.pem", "fe-1"]
    assert sorted(each.name for each in made.directory.iterdir()) == [
        "ca-cert.pem",
        "server-cert.pem",
        "server-key.pem",
    ]
    modes = [each.stat().st_mode & 0o777 for each in (pki, pki / "ca-key.pem", made.key, made.certificate)]
    assert modes == [0o700, 0o600, 0o600, 0o644]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    context.load_verify_locations(pki / "ca-cert.pem")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    directory.init(pki, "Test CA", 10 * DAY)
    key = (pki / "ca-key.pem").read_bytes()
    with pytest.raises(AlreadyExists):
        directory.init(pki, "Test CA", DAY)
    directory.issue(pki, Use.CLIENT, "host-1", (), lifetime=DAY)
    before = {each: each.read_bytes() for each in (pki / "host-1").iterdir()}
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for out in (None, pki, tmp_path / "file", tmp_path / "empty", tmp_path / "nowhere", tmp_path):
        with pytest.raises(AlreadyExists):
            directory.issue(pki, Use.CLIENT, "host-1", (), lifetime=DAY, out=out)
    assert (pki / "ca-key.pem").read_bytes() == key
    assert {each: each.read_bytes() for each in (pki / "host-1").iterdir()} == before
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="pki init"):
        directory.issue(tmp_path / "pki", Use.CLIENT, "host-1", (), lifetime=DAY)
    with pytest.raises(NotFound):
        directory.show(tmp_path)
    directory.init(tmp_path / "pki", "Test CA", DAY)
    with pytest.raises(NotFound, match="no certificate of a server"):
        directory.renew(tmp_path / "pki", tmp_path / "pki", DAY)
    for name in ("../x", ".hidden"):
        with pytest.raises(InvalidRequest, match="--out"):
            directory.issue(tmp_path / "pki", Use.CLIENT, name, (), lifetime=DAY)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["pki", "init"]) == 0
    assert "pki issue server" in capsys.readouterr().out
    assert run(["pki", "init"]) == AlreadyExists.codes.exit_code
    assert run(["pki", "issue", "server", "fe-1", "--host", "127.0.0.1", "--days", "30", "-o", "json"]) == 0
    capsys.readouterr()
    assert run(["pki", "issue", "client", "host-1", "-o", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["common_name"], made["use"], made["days_left"]) == ("host-1", "client", 396)
    assert [step.split()[0] for step in made["next"]] == ["sudo", "qemu-img", "nbdcopy", "nbdcopy", "sudo"]
    assert run(["pki", "issue", "client", "host-2", "--host", "x"]) == InvalidRequest.codes.exit_code
    assert run(["pki", "issue", "authority", "ca"]) == InvalidRequest.codes.exit_code
    assert run(["pki", "renew", "pki/fe-1", "--days", "60"]) == 0
    capsys.readouterr()
    assert run(["pki", "show", "-o", "json"]) == 0
    shown = {each["file"]: each for each in json.loads(capsys.readouterr().out)["certificates"]}
    assert list(shown) == ["pki/ca-cert.pem", "pki/fe-1/server-cert.pem", "pki/host-1/client-cert.pem"]
    assert (shown["pki/fe-1/server-cert.pem"]["names"], shown["pki/fe-1/server-cert.pem"]["days_left"]) == (
        ["127.0.0.1"],
        59,
    )
    assert run(["pki", "show"]) == 0
    assert "(59 days)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_damaged_is_refused_whatever_is_wrong_with_it(authority: Pair) -> None:
    der = ssl.PEM_cert_to_DER_cert(issue(authority, Use.SERVER, "fe", ("h", "10.0.0.1")).certificate.decode())
    chosen = random.Random(1)
    for _ in range(2000):
        damaged = bytearray(der)
        for _ in range(chosen.randrange(1, 4)):
            damaged[chosen.randrange(len(der))] = chosen.randrange(256)
        with suppress(InvalidRequest):
            describe(ssl.DER_cert_to_PEM_cert(bytes(damaged)).encode())
        with suppress(ValueError):
            peer_of(bytes(damaged))
