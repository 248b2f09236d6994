# A file system on a device that `cairn attach` made, while netem delays, reorders, loses and repeats the packets of the
# guest's interface, both ways: BAD_LINE is what netem is told. Says "SYNCED n": that a file was synced. It is told (file
# descriptor 3): "bad": the line is bad from here on; "good": it is as it was; "end".
set -eu -o pipefail
export CAIRN_CONTROL="$NBD_HOST:$NBD_PORT" CAIRN_CLIENT=guest-1
(cairn_exec attach "$NBD_EXPORT" /dev/nbd0 --dead-timeout 200 >/tmp/attached 2>/dev/ttyS0) &
watching=$!
until [ -s /tmp/attached ]; do
  kill -0 "$watching"
  sleep 0.2
done
write() {
  local number=0
  while [ ! -e /tmp/enough ]; do
    number=$((number + 1))
    { echo "$number"; cat /tmp/random; } | dd of=/mnt/file-$number bs=64k conv=fsync 2>/dev/null
    sha256sum /mnt/file-$number >>/tmp/sums
    echo "SYNCED $number at $(cut -d' ' -f1 /proc/uptime)"
    # What is read back comes over the line, too.
    echo 1 >/proc/sys/vm/drop_caches
    [ "$(head -n 1 /mnt/file-$number)" = "$number" ]
  done
}
# Of what comes in, an interface of its own has the queue: netem is for what goes out.
ip link set ifb0 up
tc qdisc add dev eth0 ingress
tc filter add dev eth0 parent ffff: matchall action mirred egress redirect dev ifb0
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/tmp/random bs=64k count=1 2>/dev/null
write &
writer=$!
while read -r -u 3 word; do
  case $word in
    bad)
      for each in eth0 ifb0; do tc qdisc add dev $each root netem $BAD_LINE; done
      ping -c 10 "$NBD_HOST" | tail -n 1
      echo BAD
      ;;
    good)
      for each in eth0 ifb0; do
        echo "$each: $(tc -s qdisc show dev $each root | tr '\n' ' ')"
        tc qdisc del dev $each root
      done
      echo GOOD
      ;;
    end) break ;;
    *) echo "no such word: $word"; exit 1 ;;
  esac
done
touch /tmp/enough
wait "$writer"
