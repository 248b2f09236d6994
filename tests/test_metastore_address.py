"""The URL and the options that name an etcd; and one that speaks TLS."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockstore.config import ControlSettings
from blockstore.control.metastore import etcd_client
from blockstore.control.metastore.etcd import open_etcd
from blockstore.control.metastore.etcd_address import PASSWORD_VARIABLE, EtcdAddress, read_address
from blockstore.control.metastore.etcd_client import EtcdClient
from blockstore.errors import InvalidRequest, QuorumUnavailable
from tests.etcd_server import Certificate, EtcdServer, running_etcd


def read(url: str, **options: Any) -> EtcdAddress | None:
    return read_address(ControlSettings(metastore=url, **options))


def test_without_a_url_there_is_none() -> None:
    assert read("") is None


def test_members_prefix_and_tls() -> None:
    assert read("etcd://a:2379") == EtcdAddress(("a:2379",), "/cairn")
    assert read("etcd://a:2379,[::1]:2379/") == EtcdAddress(("a:2379", "[::1]:2379"), "/cairn")
    assert read("etcds://a:2379/clusters/first/") == EtcdAddress(("a:2379",), "/clusters/first", tls=True)


@pytest.mark.parametrize(
    "url",
    [
        *("http://a:2379", "a:2379", "etcd://", "etcd://a", "etcd://a:1,,b:1", "etcd://user@a:2379", "etcd://a:1/x?y"),
        *("etcd://a:1//x", "etcd://a:1/x y", "etcd://a:1/" + "x" * 64),
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        read(url)


def test_files_and_passwords_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    file = tmp_path / "file"
    file.write_text("secret\n")
    for url, options, what in (
        ("etcd://a:1", {"metastore_ca_file": file}, "etcds://"),
        ("etcds://a:1", {"metastore_cert_file": file}, "together"),
        ("etcds://a:1", {"metastore_ca_file": tmp_path / "absent"}, "absent"),
        ("etcd://a:1", {"metastore_user": "u"}, PASSWORD_VARIABLE),
        ("etcd://a:1", {"metastore_password_file": file}, "--metastore-user"),
    ):
        with pytest.raises(InvalidRequest, match=what):
            read(url, **options)
    from_file = read("etcd://a:1", metastore_user="u", metastore_password_file=file)
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    from_environment = read("etcd://a:1", metastore_user="u")
    assert from_file is not None
    assert from_file == from_environment == EtcdAddress(("a:1",), user="u", password="secret")
    assert "secret" not in repr(from_file)


def test_one_that_speaks_tls_is_used_by_who_has_the_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(address: EtcdAddress | None) -> bytes:
        assert address is not None
        client = EtcdClient(address)
        try:
            store = await open_etcd(client)
            await store.transact({}, {"a": b"1"})
            found = await store.get("a")
            await store.close()
            assert found is not None
            return found.value
        finally:
            await client.close()

    def files(trusted: Certificate, shown: Certificate) -> dict[str, Path]:
        return {
            "metastore_ca_file": trusted.certificate,
            "metastore_cert_file": shown.certificate,
            "metastore_key_file": shown.key,
        }

    def check(server: EtcdServer) -> None:
        assert server.tls is not None
        stranger = Certificate.make(tmp_path / "stranger", "127.0.0.1")
        url = server.url().replace("etcd://", "etcds://")
        assert asyncio.run(use(read(url, **files(server.tls, server.tls)))) == b"1"
        monkeypatch.setattr(etcd_client, "LIMIT_S", 1.0)
        for wrong in (files(stranger, server.tls), files(server.tls, stranger), {}):
            with pytest.raises(QuorumUnavailable):
                asyncio.run(use(read(url, **wrong)))
        with pytest.raises(QuorumUnavailable):
            asyncio.run(use(read(server.url())))

    with running_etcd(tmp_path, tls=True) as server:
        check(server)
