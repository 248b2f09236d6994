# `cairn attach` and nbd-client over TLS; the certificates lie in /tmp/pki. It is told (file descriptor 3): "again": the
# front-end was started anew; "grown": the volume was resized. The front-end listens at NBD_CLIENT_PORT, too.
set -eu -o pipefail
export CAIRN_CONTROL="$NBD_HOST:$NBD_PORT" CAIRN_CLIENT=guest-1
word() {
  read -r -u 3 heard
  [ "$heard" = "$1" ]
}
nbd-client -cacertfile /tmp/pki/ca-cert.pem -certfile /tmp/pki/client-cert.pem -keyfile /tmp/pki/client-key.pem \
  -tlshostname "$NBD_HOST" -b 4096 -N other "$NBD_HOST" "$NBD_CLIENT_PORT" /dev/nbd1
dd if=/dev/urandom of=/tmp/random bs=1M count=1 2>/dev/null
dd if=/tmp/random of=/dev/nbd1 bs=64k oflag=direct 2>/dev/null
dd if=/dev/nbd1 bs=64k count=16 iflag=direct 2>/dev/null | cmp - /tmp/random
nbd-client -d /dev/nbd1
echo NBD-CLIENT
attach() {
  : >/tmp/attached
  (cairn_exec attach "$NBD_EXPORT" /dev/nbd0 --tls-certificates /tmp/pki "$@" >/tmp/attached 2>/dev/ttyS0) &
  watching=$!
  until [ -s /tmp/attached ]; do
    kill -0 "$watching"
    sleep 0.2
  done
}
attach --connections 2
[ "$(cat /sys/block/nbd0/backend)" = "cairn:$NBD_EXPORT:guest-1:2" ]
mkfs.ext4 -q /dev/nbd0 # what it may do later it does not do here: an emulated processor encrypts slowly
mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/one bs=1M count=4 conv=fsync 2>/dev/null
sha256sum /mnt/one >/tmp/sums
echo WRITTEN
word again
dd if=/dev/urandom of=/mnt/two bs=1M count=4 conv=fsync 2>/dev/null
sha256sum /mnt/two >>/tmp/sums
echo AGAIN
word grown
until [ "$(cat /sys/block/nbd0/size)" -gt $((SIZE / 512)) ]; do sleep 0.05; done
echo GROWN
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
e2fsck -f -n /dev/nbd0
cairn detach /dev/nbd0
wait "$watching"
attach --read-only
[ "$(cat /sys/block/nbd0/ro)" = 1 ]
if dd if=/tmp/random of=/dev/nbd0 bs=4k count=1 oflag=direct 2>/dev/null; then exit 1; fi
mount -o ro /dev/nbd0 /mnt
sha256sum -c /tmp/sums
umount /mnt
cairn detach /dev/nbd0
wait "$watching"
echo READ-ONLY
if dmesg | grep -E 'I/O error|EXT4-fs .*error'; then exit 1; fi
echo CLEAN
