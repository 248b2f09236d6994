# A file system under load of WRITERS on a device that `cairn attach` made with OPTIONS, while the test ends and pauses
# front-ends. The first writer says "SYNCED n at T": that a file was synced, and when (seconds of uptime). It is told
# (file descriptor 3): "resume": the process that watches is killed, and started again; "end". What that one says is
# among the kernel's words.
set -eu -o pipefail
export CAIRN_CONTROL="$NBD_HOST:$NBD_PORT" CAIRN_CLIENT=guest-1
attach() {
  rm -f /tmp/attached
  # In the place of this shell, so that its number is the one that is killed.
  (cairn_exec attach "$NBD_EXPORT" /dev/nbd0 --dead-timeout 200 $OPTIONS >/tmp/attached 2>/dev/ttyS0) &
  watching=$!
  until [ -s /tmp/attached ]; do
    kill -0 "$watching"
    sleep 0.2
  done
  cat /tmp/attached
}
write() {
  local number=0
  while [ ! -e /tmp/enough ]; do
    number=$((number + 1))
    { echo "$1 $number"; cat /tmp/random; } | dd of=/mnt/file-$1-$number bs=64k conv=fsync 2>/dev/null
    sha256sum /mnt/file-$1-$number >>/tmp/sums-$1
    if [ "$1" = 1 ]; then echo "SYNCED $number at $(cut -d' ' -f1 /proc/uptime)"; fi
    sleep 0.3 # the emulated processor has Python to run as well
  done
}
attach
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/tmp/random bs=64k count=1 2>/dev/null
for writer in $(seq "$WRITERS"); do
  write "$writer" &
  writers="${writers-} $!"
done
while read -r -u 3 word; do
  case $word in
    resume) kill -9 "$watching"; wait "$watching" || true; attach; echo RESUMED ;;
    end) break ;;
    *) echo "no such word: $word"; exit 1 ;;
  esac
done
touch /tmp/enough
for writer in $writers; do wait "$writer"; done
cat /tmp/sums-* >/tmp/sums
if cairn detach /dev/nbd0; then echo "a mounted device was detached"; exit 1; fi
