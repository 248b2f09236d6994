# The life of a file system (FILE_SYSTEM: ext4 or xfs) on an NBD device of at least 320 MiB: each step says when it was done.
set -eu -o pipefail
say() { echo "[$(cut -d' ' -f1 /proc/uptime)] $*"; }
make() {
  case $FILE_SYSTEM in
    ext4) mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0 ;;
    xfs) mkfs.xfs -q -f /dev/nbd0 ;;
  esac
}
check() {
  case $FILE_SYSTEM in
    ext4) e2fsck -f -n /dev/nbd0 ;;
    xfs) xfs_repair -n /dev/nbd0 ;;
  esac
}

# nbd-client ignores the block size that a server announces.
nbd-client -N "$NBD_EXPORT" "$NBD_HOST" "$NBD_PORT" /dev/nbd0 -b 4096
say "connected, $(($(cat /sys/block/nbd0/size) / 2048)) MiB, fua $(cat /sys/block/nbd0/queue/fua)," \
  "writes zeroes $(cat /sys/block/nbd0/queue/write_zeroes_max_bytes), Linux $(uname -r)"
make
say made
mount -t "$FILE_SYSTEM" -o discard /dev/nbd0 /mnt
say mounted

# 64 MiB of which no two blocks are alike: the same random bytes, shifted by each round's number.
dd if=/dev/urandom of=/tmp/random bs=1M count=8 2>/dev/null
for round in 1 2 3 4 5 6 7 8; do echo "round $round"; cat /tmp/random; done >/tmp/content
dd if=/tmp/content of=/mnt/content bs=1M conv=fsync 2>/dev/null
say wrote 64 MiB with fsync
umount /mnt
check
say unmounted and checked

echo 3 >/proc/sys/vm/drop_caches
mount -t "$FILE_SYSTEM" /dev/nbd0 /mnt
cmp /tmp/content /mnt/content
say remounted, the content is the same
rm /mnt/content
sync
trimmed=$(fstrim -v /mnt)
say "$trimmed"
[ "$(echo "$trimmed" | sed 's/.*: \([0-9]*\).*/\1/')" -ge $((64 << 20)) ]
umount /mnt
check
say unmounted and checked
nbd-client -d /dev/nbd0
if dmesg | grep -E 'I/O error|EXT4-fs .*error|XFS .*(error|[Cc]orrupt)|nbd0: .*(timed out|error)'; then exit 1; fi
say disconnected
