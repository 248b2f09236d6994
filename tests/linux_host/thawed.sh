# A volume that was frozen under tests/linux_host/freezing.sh: it mounts as one that was unmounted, without its journal.
set -eu -o pipefail
nbd-client -N "$NBD_EXPORT" "$NBD_HOST" "$NBD_PORT" /dev/nbd0 -b 4096 -t 120
e2fsck -f -n /dev/nbd0
mount /dev/nbd0 /mnt
if dmesg | grep -E 'nbd0.*recover|I/O error|EXT4-fs .*error'; then exit 1; fi
lines=$(wc -l </mnt/sums)
echo "$lines files are listed"
[ "$lines" -ge "$AT_LEAST" ]
sha256sum -c /mnt/sums >/tmp/checked || { cat /tmp/checked; exit 1; }
umount /mnt
nbd-client -d /dev/nbd0
echo CLEAN
