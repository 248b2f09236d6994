"""The usual chain of credentials, against a real server; and what is read of a refusal."""

import asyncio
from pathlib import Path

import pytest

from blockstore.errors import CairnError, Corrupt, InvalidRequest, NoSpace, NotFound, QuorumUnavailable
from snapshotd.s3_answers import Refusal, error_of, refusal_of
from snapshotd.s3_credentials import provider_of, read_profile
from snapshotd.stores import open_store
from tests.conftest import forget_s3
from tests.s3_server import S3Server


def profile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, credentials: str = "", config: str = "") -> None:
    forget_s3(monkeypatch)
    for variable, text in (("AWS_SHARED_CREDENTIALS_FILE", credentials), ("AWS_CONFIG_FILE", config)):
        path = tmp_path / variable
        path.write_text(text)
        monkeypatch.setenv(variable, str(path))


def keys_of(server: S3Server) -> str:
    return f"aws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"


def test_the_default_profile(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_files(tmp_path, monkeypatch, credentials="[default]\n" + keys_of(s3_server))
    asyncio.run(open_store(s3_server.settings()))


def test_a_named_profile_with_region_and_endpoint(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = f"[profile cairn]\nregion = {s3_server.region}\nendpoint_url = {s3_server.endpoint}\n"
    profile_files(tmp_path, monkeypatch, config=config, credentials="[cairn]\n" + keys_of(s3_server))
    monkeypatch.setenv("AWS_PROFILE", "cairn")
    store = asyncio.run(open_store(s3_server.settings(s3_endpoint="", s3_region="")))
    assert s3_server.endpoint in store.url


def test_the_environment_names_the_endpoint(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    asyncio.run(open_store(s3.settings(s3_endpoint="")))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    asyncio.run(open_store(s3.settings()))  # what the settings say comes first


def test_the_environment_comes_before_the_files(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_files(tmp_path, monkeypatch, credentials="[default]\n" + keys_of(s3_server))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "with-another-key")
    with pytest.raises(InvalidRequest, match="InvalidAccessKeyId"):
        asyncio.run(open_store(s3_server.settings()))


def test_no_credential_at_all(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance's metadata service is asked last; there is none here."""
    forget_s3(monkeypatch)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CairnError, match=r"no credential in the environment or in ~/\.aws"):
        asyncio.run(open_store(s3_server.settings(open_limit_s=1.0)))


def test_a_credential_that_is_renewed_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_files(tmp_path, monkeypatch, credentials="[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    provider = provider_of()
    assert provider is not None
    assert provider()["secret_access_key"] == "b"
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(
        "[default]\naws_access_key_id=a\naws_secret_access_key=c\naws_session_token=t\n"
    )
    assert (provider()["secret_access_key"], provider()["token"]) == ("c", "t")
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text("")
    with pytest.raises(InvalidRequest, match="no access key any more"):
        provider()


@pytest.mark.parametrize(
    ("credentials", "profile", "said"),
    [
        ("", "nobody", "AWS_PROFILE is 'nobody'"),
        ("[default]\naws_access_key_id = A\n", "", "only one of"),
        ("this is no = section\nwith-a-secret", "", "cannot read .*MissingSectionHeaderError$"),
    ],
)
def test_files_that_are_not_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: str, profile: str, said: str
) -> None:
    profile_files(tmp_path, monkeypatch, credentials=credentials)
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(InvalidRequest, match=said) as caught:
        read_profile()
    assert "secret" not in str(caught.value).replace("aws_secret_access_key", "")


def test_a_profile_prints_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_files(tmp_path, monkeypatch, credentials="[default]\naws_access_key_id=AKIA\naws_secret_access_key=hush\n")
    assert "AKIA" not in repr(read_profile())
    assert "hush" not in repr(read_profile())


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "SlowDown", QuorumUnavailable),
        (503, "", QuorumUnavailable),
        (500, "InternalError", QuorumUnavailable),
        (429, "", QuorumUnavailable),
        (400, "RequestTimeout", QuorumUnavailable),
        (400, "XAmzContentSHA256Mismatch", QuorumUnavailable),
        (400, "ExpiredToken", QuorumUnavailable),
        (409, "ConditionalRequestConflict", QuorumUnavailable),
        (0, "", QuorumUnavailable),
        (507, "XMinioStorageFull", NoSpace),
        (403, "QuotaExceeded", NoSpace),
        (404, "NoSuchKey", NotFound),
        (404, "NoSuchBucket", InvalidRequest),
        (416, "InvalidRange", Corrupt),
        (403, "AccessDenied", InvalidRequest),
        (403, "RequestTimeTooSkewed", InvalidRequest),
        (301, "PermanentRedirect", InvalidRequest),
        (400, "AuthorizationHeaderMalformed", InvalidRequest),
        (400, "SomethingNew", InvalidRequest),
    ],
)
def test_what_a_refusal_means(status: int, code: str, kind: type[CairnError]) -> None:
    text = (
        f'Server said\n\nStatus {{\n    status: {status},\n    body: "<Error><Code>{code}</Code></Error>"'
        if status
        else ""
    )
    refusal = refusal_of(text)
    assert refusal == Refusal(status, code, "")
    assert type(error_of(refusal, "cannot read x", key="x")) is kind


def test_a_missing_object_is_only_one_where_one_was_read() -> None:
    assert type(error_of(Refusal(404, "", ""), "cannot list")) is InvalidRequest
