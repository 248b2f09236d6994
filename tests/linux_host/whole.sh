# The end of a script in which /tmp/sums lists the files of /mnt on /dev/nbd0, and `cairn attach` is the job $watching:
# all of them are there, the file system is sound, the device goes, and the kernel saw no error.
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
e2fsck -f -n /dev/nbd0
mount -o ro /dev/nbd0 /mnt
echo "$(wc -l </tmp/sums) files are listed"
sha256sum -c /tmp/sums >/tmp/checked || { cat /tmp/checked; exit 1; }
umount /mnt
cairn detach "$NBD_EXPORT" -o json
wait "$watching"
[ ! -e /sys/block/nbd0/pid ]
if dmesg | grep -E 'I/O error|EXT4-fs .*error'; then exit 1; fi
echo CLEAN
