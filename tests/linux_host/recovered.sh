# A volume that was cut off under tests/linux_host/load.sh: its journal is replayed, all synced files are there.
set -eu -o pipefail
nbd-client -N "$NBD_EXPORT" "$NBD_HOST" "$NBD_PORT" /dev/nbd0 -b 4096 -t 120
mount /dev/nbd0 /mnt
echo MOUNTED
lines=$(wc -l </mnt/sums)
echo "$lines files are listed"
[ "$lines" -ge "$AT_LEAST" ]
sha256sum -c /mnt/sums >/tmp/checked || { cat /tmp/checked; exit 1; }
echo more >/mnt/written-while-hydrating
umount /mnt
e2fsck -f -n /dev/nbd0
nbd-client -d /dev/nbd0
if dmesg | grep -E 'I/O error|EXT4-fs .*error|nbd0: .*(timed out|error)'; then exit 1; fi
echo CLEAN
