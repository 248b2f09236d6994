#!/sbin/busybox sh
# The first process of a guest that boots from a disk: runs /work with the ports that tests/linux_host/machine.py reads.
/sbin/busybox --install -s /bin
export PATH=/sbin:/bin HOME=/
mount -t tmpfs tmpfs /tmp
chmod 1777 /tmp
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
stty -F /dev/ttyS1 raw
stty -F /dev/ttyS3 -echo
bash /work </dev/null >/dev/ttyS1 2>&1 3</dev/ttyS3
echo $? >/dev/ttyS2
stty -F /dev/ttyS1 raw # which waits until all is sent
stty -F /dev/ttyS2 raw
mount -o remount,ro /
poweroff -f
