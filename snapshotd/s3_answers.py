"""What an S3 server's refusal means, in the errors of Cairn.

obstore raises few classes: most refusals are one "generic" error, whose text holds the HTTP status and the body.
From there the status and the `Code` element are taken ("Error responses" in Amazon's S3 API reference): both belong
to the protocol, and the table below goes by them alone. The other text is not shown: servers repeat access keys in it,
and the strings that they had to sign.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from blockstore.errors import CairnError, Corrupt, InvalidRequest, NoSpace, NotFound, QuorumUnavailable

_STATUS: Final = re.compile(r"Status \{\s+status: ([0-9]{3}),")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
#: Of a request that got no answer: what the system or the TLS library says.
_CAUSES: Final = re.compile(r'(?:message|error): "([^"\\]{1,200})"|(TimedOut|InvalidContentType|UnexpectedEof)')
_IN_WORDS: Final[Mapping[str, str]] = {
    "TimedOut": "it took too long",
    "InvalidContentType": "there is no TLS at that port: is it http?",
    "UnexpectedEof": "the connection ended too early",
}

_REGION: Final = "the region is another: set it to the bucket's"
_CREDENTIAL: Final = "check the access key in the environment or the profile"
#: Codes that no retry helps, and what to do.
_ADVICE: Final[Mapping[str, str]] = {
    "NoSuchBucket": "there is no such bucket: create it, or correct the address",
    "InvalidBucketName": "no bucket can have that name: correct the address",
    "InvalidAccessKeyId": f"the access key is not known there: {_CREDENTIAL}",
    "SignatureDoesNotMatch": f"the secret key is not the one of the access key: {_CREDENTIAL}",
    "InvalidToken": f"the session token is not valid: {_CREDENTIAL}",
    "AccessDenied": "the credential has no right to do that, or there is none: it must list, read, write and delete",
    "AccountProblem": "the account is closed for this",
    "AllAccessDisabled": "all access to it is disabled",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's: set it",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "IncorrectEndpoint": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "MethodNotAllowed": "what answers there is no S3 server, or the bucket is part of its name",
}
_FULL: Final = {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "StorageQuotaExceeded"}
#: Refusals by their status, and yet worth a retry: a body that came late or damaged, credentials about to be renewed,
#: conditional puts that met.
_PASSING: Final = {
    "RequestTimeout",
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "ExpiredToken",
    "OperationAborted",
    "ConditionalRequestConflict",
    "SlowDown",
    "TooManyRequests",
}
_PASSING_STATUS: Final = {408, 409, 425, 429}


@dataclass(frozen=True, slots=True)
class Refusal:
    """status: of HTTP, 0 where none came. code: S3's, or "". cause: for people, where no answer came."""

    status: int
    code: str
    cause: str

    def __str__(self) -> str:
        if not self.status:
            return self.cause or "the connection broke"
        return f"HTTP {self.status}{' ' if self.code else ''}{self.code}"


def refusal_of(text: str) -> Refusal:
    """What the text of an error of obstore says."""
    status, code = _STATUS.search(text), _CODE.search(text)
    causes = [_IN_WORDS.get(first or second, first or second) for first, second in _CAUSES.findall(text)]
    return Refusal(int(status[1]) if status else 0, code[1] if status and code else "", causes[-1] if causes else "")


def error_of(refusal: Refusal, what: str, *, key: str | None = None) -> CairnError:
    """The error to raise. what: was not done, with the address. key: of an object that may be missing, on reads."""
    text = f"{what}: {refusal}"
    if refusal.code in _ADVICE:
        return InvalidRequest(f"{text}: {_ADVICE[refusal.code]}")
    if refusal.code in _FULL or refusal.status == 507:
        return NoSpace(f"{text}: make room there")
    if refusal.status == 404 and key is not None:
        return NotFound(text)
    if refusal.status == 416:
        return Corrupt(f"{text}: the object is shorter")
    if refusal.code in _PASSING or refusal.status in _PASSING_STATUS or not 300 <= refusal.status < 500:
        return QuorumUnavailable(text)
    return InvalidRequest(f"{text}: is it an S3 server, and are bucket, region and credential right?")
