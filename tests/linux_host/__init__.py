"""A real Linux kernel as the NBD client: Debian's, in QEMU, without root or KVM.

    python -m tests.linux_host nbd://127.0.0.1:10809/vol-0123456789abcdef0

runs the ext4 and the xfs sequence against any NBD server on this machine's loopback and prints what
they say. The tests call `guest.run` and `guest.running`, or boot a disk of their own (boot_disk.py).
"""
