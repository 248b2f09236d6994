"""Who we are for S3: the usual chain, as Amazon's tools have it.

1. The environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), or a web identity's token file
   or a container's address, as schedulers set them.
2. The profile AWS_PROFILE (or "default") in ~/.aws/credentials and ~/.aws/config, or in the files that
   AWS_SHARED_CREDENTIALS_FILE and AWS_CONFIG_FILE name: aws_access_key_id, aws_secret_access_key,
   aws_session_token; also its region and endpoint_url.
3. The instance's metadata service.

1 and 3 are obstore's own work; 2 it does not know, so it is here. The files are read again every few minutes, so that
a credential can be renewed while a daemon runs. Nothing of it is ever printed.
"""

import configparser
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from blockstore.errors import InvalidRequest

if TYPE_CHECKING:
    from obstore.store import S3Credential

#: What tells that obstore finds a credential in the environment, or an address to get one from.
_IN_ENVIRONMENT: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_READ_AGAIN: Final = timedelta(minutes=5)
CredentialProvider = Callable[[], "S3Credential"]


@dataclass(frozen=True, slots=True)
class Profile:
    """What a profile says; empty strings for what it does not. The keys are not part of what it prints."""

    name: str
    region: str = ""
    endpoint: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


def is_in_environment(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment holds a credential or says where one is."""
    return any(environment.get(name) for name in _IN_ENVIRONMENT)


def endpoint_in_environment(environment: Mapping[str, str] = os.environ) -> str:
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""


def region_in_environment(environment: Mapping[str, str] = os.environ) -> str:
    return environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or ""


def read_profile(environment: Mapping[str, str] = os.environ) -> Profile | None:
    """The profile that applies; None where no file has it, and nobody asked for it by name.

    Raises InvalidRequest for one that was asked for and is missing, or that is half a credential.
    """
    asked = environment.get("AWS_PROFILE", "")
    name = asked or "default"
    members: dict[str, str] = {}
    for path, section in _files(environment, name):
        members |= _section(path, section)
    if not members:
        if asked:
            raise InvalidRequest(f"AWS_PROFILE is {asked!r}, and no file in ~/.aws has that profile")
        return None
    keys = members.get("aws_access_key_id", ""), members.get("aws_secret_access_key", "")
    if any(keys) and not all(keys):
        raise InvalidRequest(f"the profile {name!r} has only one of aws_access_key_id and aws_secret_access_key")
    endpoint = members.get("endpoint_url", "")
    return Profile(name, members.get("region", ""), endpoint, *keys, members.get("aws_session_token", ""))


def provider_of(environment: Mapping[str, str] = os.environ) -> CredentialProvider | None:
    """What obstore asks for a credential, where the files have one and the environment has none; else None."""
    profile = None if is_in_environment(environment) else read_profile(environment)
    if profile is None or not profile.access_key:
        return None

    def credential() -> "S3Credential":
        current = read_profile(environment) or Profile(profile.name)
        if not current.access_key:
            raise InvalidRequest(f"the profile {profile.name!r} has no access key any more")
        return {
            "access_key_id": current.access_key,
            "secret_access_key": current.secret_key,
            "token": current.token or None,
            "expires_at": datetime.now(UTC) + _READ_AGAIN,
        }

    return credential


def _files(environment: Mapping[str, str], profile: str) -> list[tuple[Path, str]]:
    """The files with the section to read in each; what the later ones say wins."""
    home = Path(environment.get("HOME", "/")) / ".aws"
    config = environment.get("AWS_CONFIG_FILE") or str(home / "config")
    credentials = environment.get("AWS_SHARED_CREDENTIALS_FILE") or str(home / "credentials")
    in_config = profile if profile == "default" else f"profile {profile}"
    return [(Path(config).expanduser(), in_config), (Path(credentials).expanduser(), profile)]


def _section(path: Path, section: str) -> Mapping[str, str]:
    parser = configparser.RawConfigParser()
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # Not its text: a parser quotes the line that it stumbles over.
        raise InvalidRequest(f"cannot read {path}: {type(error).__name__}") from None
    return dict(parser[section]) if parser.has_section(section) else {}
