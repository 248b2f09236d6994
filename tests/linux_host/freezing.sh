# A file system that is written to without a sync, and frozen and thawed when it is told to (file descriptor 3).
# All that stands before "FROZEN" as WRITTEN has its sum in "sums", and is on the disk when that line comes.
set -eu -o pipefail
nbd-client -N "$NBD_EXPORT" "$NBD_HOST" "$NBD_PORT" /dev/nbd0 -b 4096
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/tmp/random bs=64k count=1 2>/dev/null
write() {
  local number=0
  while [ "$number" -lt "$MOST_FILES" ] && [ ! -e /tmp/enough ]; do
    number=$((number + 1))
    { echo "$number"; cat /tmp/random; } >/mnt/file-$number
    sha256sum /mnt/file-$number >>/mnt/sums
    echo "WRITTEN $number"
  done
}
write &
writer=$!
# The long options are the only ones that busybox has.
while read -r -u 3 word; do
  case $word in
    freeze) fsfreeze --freeze /mnt; echo FROZEN ;;
    thaw) fsfreeze --unfreeze /mnt; echo THAWED ;;
    end) break ;;
    *) echo "no such word: $word"; exit 1 ;;
  esac
done
touch /tmp/enough
wait "$writer"
umount /mnt
nbd-client -d /dev/nbd0
