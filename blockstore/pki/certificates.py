"""X.509 certificates: an authority, servers and clients under it. No files here.

Keys are on the curve P-256: every TLS 1.2 and 1.3 library knows them, and a handshake costs a server little. An
authority signs certificates of servers and clients and no further authority. Purposes stand in the certificate, so that
a client's cannot be used to pose as a server. Times are UTC.
Source: RFC 5280 (profile), RFC 5480 (keys on curves: no key encipherment), RFC 6125 (a server's names are in
subjectAltName alone).
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from blockstore.errors import Conflict, InvalidRequest
from blockstore.pki.uses import Use

#: A machine whose clock is slow shall be able to use what was just issued.
_CLOCKS_DIFFER: Final = timedelta(hours=1)
#: RFC 5280, appendix A.1: ub-common-name.
_MAX_COMMON_NAME: Final = 64


#: What cryptography raises besides ValueError for a certificate that it does not understand.
_UNREADABLE: Final = (TypeError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
E = TypeVar("E", bound=x509.ExtensionType)


_PURPOSE: Final = {Use.SERVER: ExtendedKeyUsageOID.SERVER_AUTH, Use.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Description:
    """What a certificate says. subject, issuer: as RFC 4514 writes them. names: DNS names and addresses.

    use: None where it may be used for neither or for both. fingerprint: SHA-256 of it, in hexadecimal digits.
    """

    subject: str
    common_name: str
    issuer: str
    use: Use | None
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    serial: int
    fingerprint: str

    def days_left(self, now: datetime | None = None) -> int:
        """Whole days until it expires; negative where it has."""
        return (self.not_after - (now or datetime.now(UTC))).days


def make_authority(common_name: str, lifetime: timedelta, now: datetime | None = None) -> Pair:
    """An authority that vouches for itself. Raises InvalidRequest."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(common_name)
    began = now or datetime.now(UTC)
    builder = _builder(name, name, key.public_key(), began, began + lifetime)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    return _pair(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Pair,
    use: Use,
    common_name: str,
    names: Sequence[str],
    *,
    lifetime: timedelta,
    now: datetime | None = None,
) -> Pair:
    """A certificate for a server or a client, with a new key; it expires with the authority at the latest.

    names: DNS names and IP addresses of a server. Raises InvalidRequest, and Conflict for an authority that has
    expired or is none.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    return _issue(authority, key, use, _name(common_name), names, lifetime=lifetime, now=now)


def renew(authority: Pair, old: Pair, lifetime: timedelta, now: datetime | None = None) -> Pair:
    """As the old one, for the same key, with a new time. Raises as `issue`, and Conflict where `old` is no pair."""
    key = _load_key(old)
    found = describe(old.certificate)
    if found.use not in _PURPOSE:
        raise InvalidRequest(f"{found.subject} is no certificate of a server or a client: only those are renewed")
    subject = x509.load_pem_x509_certificate(old.certificate).subject
    return _issue(authority, key, found.use, subject, found.names, lifetime=lifetime, now=now)


def describe(pem: bytes) -> Description:
    """What a certificate in PEM says; of several, the first. Raises InvalidRequest."""
    try:
        return _described(x509.load_pem_x509_certificate(pem))
    except (ValueError, *_UNREADABLE) as error:
        raise InvalidRequest(f"no certificate in PEM, or one that cannot be read: {error}") from error


def _described(found: x509.Certificate) -> Description:
    return Description(
        subject=found.subject.rfc4514_string(),
        common_name=_common_name(found.subject),
        issuer=found.issuer.rfc4514_string(),
        use=_use_of(found),
        names=tuple(str(each.value) for each in _extension(found, x509.SubjectAlternativeName) or ()),
        not_before=found.not_valid_before_utc,
        not_after=found.not_valid_after_utc,
        serial=found.serial_number,
        fingerprint=found.fingerprint(hashes.SHA256()).hex(),
    )


def _issue(
    authority: Pair,
    key: ec.EllipticCurvePrivateKey,
    use: Use,
    subject: x509.Name,
    names: Sequence[str],
    *,
    lifetime: timedelta,
    now: datetime | None,
) -> Pair:
    began = now or datetime.now(UTC)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    signing = _load_key(authority)
    _check_authority(issuer, began)
    ends = min(began + lifetime, issuer.not_valid_after_utc)
    builder = _builder(subject, issuer.subject, key.public_key(), began, ends)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(authority=False), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([_PURPOSE[use]]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
    )
    if names:
        alternatives = [_general_name(each) for each in dict.fromkeys(names)]
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return _pair(builder.sign(signing, hashes.SHA256()), key)


def _check_authority(issuer: x509.Certificate, now: datetime) -> None:
    constraints = _extension(issuer, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise Conflict(f"{issuer.subject.rfc4514_string()} is no authority: it cannot vouch for others")
    if issuer.not_valid_after_utc <= now:
        raise Conflict(
            f"the authority {issuer.subject.rfc4514_string()} has expired at {issuer.not_valid_after_utc:%Y-%m-%d}: "
            "make another one with `cairn pki init`"
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, began: datetime, ends: datetime
) -> x509.CertificateBuilder:
    if ends <= began:
        raise InvalidRequest("a certificate has to be valid for a day at least")
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(began - _CLOCKS_DIFFER).not_valid_after(ends)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    if not 0 < len(common_name) <= _MAX_COMMON_NAME or not common_name.isprintable():
        raise InvalidRequest(f"{common_name!r} is no name: it needs 1 to {_MAX_COMMON_NAME} printable characters")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _common_name(subject: x509.Name) -> str:
    """Empty where there is none, or more than one: such a name tells nobody apart."""
    found = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        if not text or any(not (each.isalnum() or each in "-.*_") for each in text):
            raise ValueError("it has other characters than letters, digits, '-', '.', '_' and '*'")
        return x509.DNSName(text)
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is no host's name or address: {error}") from error


def _use_of(certificate: x509.Certificate) -> Use | None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        return Use.AUTHORITY
    purposes = set(_extension(certificate, x509.ExtendedKeyUsage) or ())
    uses = [use for use, purpose in _PURPOSE.items() if purpose in purposes]
    return uses[0] if len(uses) == 1 else None


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _load_key(pair: Pair) -> ec.EllipticCurvePrivateKey:
    """Raises InvalidRequest for what is no key of ours, Conflict where the certificate is another key's."""
    try:
        key = serialization.load_pem_private_key(pair.key, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"no key in PEM, or one under a passphrase: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidRequest(f"a key of the kind {type(key).__name__}: only those on elliptic curves are used here")
    if x509.load_pem_x509_certificate(pair.certificate).public_key() != key.public_key():
        raise Conflict("the certificate and the key do not belong together: one of the files was replaced")
    return key


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    pem = serialization.Encoding.PEM
    return Pair(
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
