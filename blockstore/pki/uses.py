"""What a certificate is for."""

from enum import Enum


class Use(Enum):
    """Each certificate is for one of these."""

    AUTHORITY = "authority"
    SERVER = "server"
    CLIENT = "client"
