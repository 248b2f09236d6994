"""A certificate authority of one's own, for TLS between NBD clients and front-ends.

Design. `certificates` makes and reads X.509 certificates, and knows no files; `directory` says where they lie, in the
names that qemu and libnbd expect. The `cairn pki` command stands on both.

Invariants: a file that exists is never overwritten, but for a certificate that is renewed, which is replaced whole; a
directory appears with all of its files or not at all; a key is readable by its owner alone from its first byte on.
"""
