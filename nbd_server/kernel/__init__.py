"""The Linux kernel's own NBD client, as `cairn attach` uses it: a volume as a block device of this host.

Design. User space does the handshake (`negotiation`, `link`) and hands the socket to the kernel over generic netlink
(`messages`, `netlink`); from then on guests' I/O passes the kernel and the front-end alone. A process beside it watches
(`supervision` is its states, `supervisor` its loop): where the link breaks, the front-end hangs or the volume moves, it
asks control where the volume is now (`whereabouts`) and gives the kernel another socket. `kernel_tls` is TLS for such
sockets. `devices` reads what sysfs and mountinfo say; the kernel keeps whose device it is, so nothing is kept in files
and a supervisor may be killed.

Why there is one connection, unless several are asked for. With one, the kernel can only send a request again over a
socket that it was given here, and a front-end that hands one out has ended the older ones before (nbd_server/links.py).
With several it does so by itself, over another one that was open before, when a request is slow or a socket breaks; so
they are links of one set, which the front-end ends as soon as a queue of requests comes by another link than before.
Then all are made anew (`handover`, `stand_in`). One connection carries over 100,000 IOPS.

Why no request has a timeout in the kernel where there is one. With NBD_ATTR_TIMEOUT a slow request would end the
connection for all others. With 0 the kernel never gives a socket up by itself; at each expiry of a request's timer (set
in sysfs, `devices.RETRY_MS`) it looks whether the request went out on a socket that has been replaced since, and only
then sends it again. That bounds how long a request in flight waits after a new socket is there. With several sockets it
gives one up at each expiry, whatever the timeout is, so that is a compromise there (`handover.SLOW_S`).
Source: Linux, drivers/block/nbd.c (nbd_xmit_timeout, nbd_handle_cmd, find_fallback, nbd_genl_reconfigure), 5.14 and
later.
"""
