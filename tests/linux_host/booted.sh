# What the guest that boots from a volume does. It is told (file descriptor 3): "load": PostgreSQL under pgbench, and
# files, until the plug is pulled; "check": whether all of that is right, after a recovery.
# Says "COMMITTED n": so many transactions were committed; "SYNCED n": so many files were synced and listed.
set -eu -o pipefail
as_postgres() { su postgres -s /bin/sh -c "$*"; }
query() { "$PROGRAMS/psql" -h /tmp -U postgres -At -c "$1" postgres; }
start() { as_postgres "$PROGRAMS/pg_ctl" -D /database -w -t 200 -l /database/log start >/dev/null; }
bench() { "$PROGRAMS/pgbench" -h /tmp -U postgres -n -c 4 -j 2 "$@" postgres; }
write() {
  local number=0
  dd if=/dev/urandom of=/tmp/random bs=64k count=1 2>/dev/null
  while :; do
    number=$((number + 1))
    { echo "$number"; cat /tmp/random; } | dd of=/files/$number bs=64k conv=fsync 2>/dev/null
    sha256sum /files/$number >>/files/sums
    sync /files /files/sums
    echo "SYNCED $number"
    sleep 1 # the load is the database
  done
}
load() {
  mkdir /files
  write &
  start
  bench -T 1000 &
  while :; do
    echo "COMMITTED $(query 'SELECT count(*) FROM pgbench_history')"
    sleep 1
  done
}
# Each transaction adds one amount to an account, a teller and a branch, and notes it (the manual's page on pgbench).
balanced() {
  query "SELECT CASE WHEN (SELECT sum(abalance) FROM pgbench_accounts) = d AND (SELECT sum(tbalance) FROM pgbench_tellers) = d
    AND (SELECT sum(bbalance) FROM pgbench_branches) = d THEN 'BALANCED' ELSE 'NOT BALANCED' END, n
    FROM (SELECT sum(delta) AS d, count(*) AS n FROM pgbench_history) AS history"
}
check() {
  start
  grep -q 'redo done' /database/log
  echo RECOVERED
  balanced
  "$PROGRAMS/pg_amcheck" -h /tmp -U postgres --heapallindexed postgres
  bench -t 10 >/dev/null
  balanced
  as_postgres "$PROGRAMS/pg_ctl" -D /database -w -m fast stop >/dev/null
  as_postgres "$PROGRAMS/pg_checksums" -D /database --check
  echo "LISTED $(wc -l </files/sums)"
  sha256sum -c /files/sums >/tmp/checked || { cat /tmp/checked; exit 1; }
  if dmesg | grep -E 'I/O error|EXT4-fs .*error'; then exit 1; fi
  echo CLEAN
}
echo READY
read -r -u 3 word
"$word"
