# A file system under load: files that are synced are named in a list that is synced after them, in "sums".
# It says so in order: all that stands before "SYNCED n" was on the disk before that line.
set -eu -o pipefail
nbd-client -N "$NBD_EXPORT" "$NBD_HOST" "$NBD_PORT" /dev/nbd0 -b 4096
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/tmp/random bs=1M count=1 2>/dev/null
number=0
while [ "$number" -lt "$FILES" ]; do
  number=$((number + 1))
  { echo "$number"; cat /tmp/random; } | dd of=/mnt/file-$number bs=64k conv=fsync 2>/dev/null
  sha256sum /mnt/file-$number >>/mnt/sums
  sync
  echo "SYNCED $number"
  [ $((number % 4)) -ne 0 ] || rm -f /mnt/scratch
  cat /tmp/random >>/mnt/scratch # never synced by itself
done
umount /mnt
nbd-client -d /dev/nbd0
