# A restored volume under tests/linux_host/load.sh whose object store goes away and comes back; it is told when.
# Says HERE once what it has read before is read again without the object store, and WAITING once the rest waits.
set -eu -o pipefail
heard() { read -r -u 3 word; [ "$word" = "$1" ]; }
nbd-client -N "$NBD_EXPORT" "$NBD_HOST" "$NBD_PORT" /dev/nbd0 -b 4096 -t 120
mount /dev/nbd0 /mnt
cp /mnt/sums /tmp/sums
lines=$(wc -l </tmp/sums)
echo "$lines files are listed"
[ "$lines" -ge "$AT_LEAST" ]
head -n 1 /tmp/sums | sha256sum -c
echo MOUNTED
heard gone
echo 3 >/proc/sys/vm/drop_caches
head -n 1 /tmp/sums | sha256sum -c
echo HERE
tac /tmp/sums | sha256sum -c >/tmp/checked 2>&1 &
checking=$!
# Reads are in flight, and none was completed for ten looks in a row: /sys/block/nbd0/stat begins with their count.
before=
same=0
while [ "$same" -lt 10 ]; do
  kill -0 "$checking" 2>/dev/null || { echo "all was read without the object store"; cat /tmp/checked; exit 1; }
  read -r completed _ </sys/block/nbd0/stat
  read -r in_flight _ </sys/block/nbd0/inflight
  if [ "$in_flight" -gt 0 ] && [ "$completed" = "$before" ]; then same=$((same + 1)); else same=0; fi
  before=$completed
  sleep 0.2
done
echo WAITING
heard back
wait "$checking" || { cat /tmp/checked; exit 1; }
echo READ
echo more >/mnt/written-while-hydrating
umount /mnt
e2fsck -f -n /dev/nbd0
nbd-client -d /dev/nbd0
if dmesg | grep -E 'I/O error|EXT4-fs .*error|nbd0: .*(timed out|error)'; then exit 1; fi
echo CLEAN
