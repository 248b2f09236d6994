# A volume through four connections, its snapshot, and a throw-away clone of that, in one kernel. It is told (file
# descriptor 3) to go on once it has said what it did to the empty volume, and the snapshot's id once all that this must
# have is synced.
set -eu -o pipefail
connect() { nbd-client -N "$1" "$NBD_HOST" "$NBD_PORT" "$2" -b 4096 "${@:3}"; }
part() { dd if=/tmp/random bs=1M skip="$1" count="$2" 2>/dev/null; }

connect "$NBD_EXPORT" /dev/nbd0 -C 4
[ "$(netstat -tn | grep -c ":$NBD_PORT .*ESTABLISHED")" = 4 ]
[ "$(cat /sys/block/nbd0/queue/write_zeroes_max_bytes)" -gt 0 ]
dd if=/dev/urandom of=/tmp/random bs=1M count=8 2>/dev/null
dd if=/tmp/random of=/dev/nbd0 bs=1M oflag=direct 2>/dev/null
blkdiscard -z -o 1M -l 4M /dev/nbd0
fallocate -z -o 6M -l 1M /dev/nbd0
{ part 0 1; dd if=/dev/zero bs=1M count=4 2>/dev/null; part 5 1; dd if=/dev/zero bs=1M count=1 2>/dev/null; part 7 1; } >/tmp/expected
dd if=/dev/nbd0 bs=1M count=8 iflag=direct 2>/dev/null | cmp - /tmp/expected
echo ZEROED
read -r -u 3 _

mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
mkdir /volume /snapshot /clone
mount -t ext4 /dev/nbd0 /volume
write() { # each file through one of the connections
  local writers=
  for number in "$@"; do
    { echo "$number"; part 0 2; } | dd of=/volume/$number bs=64k conv=fsync 2>/dev/null &
    writers="$writers $!"
  done
  for writer in $writers; do wait "$writer"; done
}
write 1 2 3 4
fsfreeze --freeze /volume # what was written until here stands in no journal
fsfreeze --unfreeze /volume
write 5 6
(cd /volume && sha256sum 1 2 3 4 5 6) >/tmp/sums
echo WRITTEN
read -r -u 3 snapshot
rm /volume/1
echo later >/volume/later

connect "$snapshot" /dev/nbd1
[ "$(cat /sys/block/nbd1/ro)" = 1 ]
if dd if=/tmp/random of=/dev/nbd1 bs=4k count=1 oflag=direct 2>/dev/null; then echo "a snapshot was written to"; exit 1; fi
mount -t ext4 -o ro,noload /dev/nbd1 /snapshot # whose journal cannot be replayed
(cd /snapshot && head -n 4 /tmp/sums | sha256sum -c && [ ! -e later ])
umount /snapshot
echo SNAPSHOT

connect "$snapshot+rw" /dev/nbd2
mount -t ext4 /dev/nbd2 /clone # which replays the journal
(cd /clone && sha256sum -c /tmp/sums && rm 1 && cat 2 >3 && sync)
echo 3 >/proc/sys/vm/drop_caches
(cd /clone && [ ! -e 1 ] && cmp 2 3)
umount /clone
e2fsck -f -n /dev/nbd2
nbd-client -d /dev/nbd2
connect "$snapshot+rw" /dev/nbd2
mount -t ext4 /dev/nbd2 /clone
(cd /clone && sha256sum -c /tmp/sums)
umount /clone
nbd-client -d /dev/nbd2
nbd-client -d /dev/nbd1
echo CLONE

(cd /volume && tail -n 5 /tmp/sums | sha256sum -c && [ ! -e 1 ] && [ -e later ])
umount /volume
e2fsck -f -n /dev/nbd0
nbd-client -d /dev/nbd0
if dmesg | grep -E 'I/O error|EXT4-fs .*error|nbd[0-2]: .*(timed out|error)'; then exit 1; fi
echo CLEAN
