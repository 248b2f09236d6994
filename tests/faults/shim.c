/* What stands between a process and the C library, so that a test may take its power, slow its disk or move its clock.
 *
 * Loaded with LD_PRELOAD. Below CAIRN_SHIM_ROOT every call that changes a file or a directory is carried out, and then
 * appended to a log of its own for each process (CAIRN_SHIM_LOG is the prefix of its name), which begins with the first
 * such call, so that a process may fork before it. One lock is held over both, so the log has the order of the calls. A sync is logged when it begins and when it has ended: what was logged
 * before the beginning is on the disk once the end is in the log. tests/faults/power.py makes of the log what a disk
 * may hold after a power cut. A call that changes files in a way that the log has no word for ends the process.
 *
 * CAIRN_SHIM_CONTROL is a file of `struct control`, read anew at every call, so a test changes it while the process
 * runs. With `real_syncs` zero nothing reaches a real disk: a sync is then what the log says of it, and its delay.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock_offset_ns;  /* of the wall clock */
    int64_t sync_least_us;    /* how long a sync takes: evenly between these two */
    int64_t sync_most_us;
    int64_t real_syncs;
};

enum { CREATE = 1, MKDIR, RENAME, LINK, UNLINK, WRITE, ZEROES, TRUNCATE, SYNC_BEGIN, SYNC_END };

struct header {
    uint32_t size;    /* of the whole record */
    uint8_t operation;
    uint8_t durable;  /* a write through a descriptor with O_DSYNC */
    uint16_t names;   /* bytes of one or two paths, each ended by a zero byte; data follow */
    uint64_t inode;
    uint64_t a, b;    /* offset and length; size; number of a sync */
};

static char root[PATH_MAX];
static size_t root_length;
static const char *log_prefix;
static int log_fd = -1;
static volatile struct control *control;
static const struct control none = {0, 0, 0, 1};
static uint64_t syncs;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static void die(const char *what) {
    dprintf(2, "fault shim: %s (errno %d)\n", what, errno);
    _exit(97);
}

static const volatile struct control *now(void) { return control ? control : &none; }

__attribute__((constructor)) static void start(void) {
    const char *where = getenv("CAIRN_SHIM_ROOT"), *log = getenv("CAIRN_SHIM_LOG"), *steer = getenv("CAIRN_SHIM_CONTROL");
    if (steer) {
        int fd = syscall(SYS_openat, AT_FDCWD, steer, O_RDONLY | O_CLOEXEC, 0);
        void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *control, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) die("cannot map CAIRN_SHIM_CONTROL");
        control = map;
        close(fd);
    }
    if (where && log) {
        snprintf(root, sizeof root, "%s/", where);
        root_length = strlen(root);
        log_prefix = log;
    }
}

static void begin_log(void) {
    struct timespec time;
    char name[PATH_MAX];
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &time);
    srandom(time.tv_nsec ^ getpid());
    snprintf(name, sizeof name, "%s.%020lld-%d", log_prefix, (long long)time.tv_sec * 1000000000 + time.tv_nsec, getpid());
    log_fd = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0) die("cannot make the log");
}

static void record(int operation, int durable, uint64_t inode, uint64_t a, uint64_t b, const char *first,
                   const char *second, const struct iovec *data, int count) {
    if (log_fd < 0) begin_log();
    struct header header = {0};
    struct iovec parts[1027];
    int used = 0;
    size_t size = sizeof header;
    parts[used++] = (struct iovec){&header, sizeof header};
    const char *names[] = {first, second};
    for (int each = 0; each < 2; each++)
        if (names[each]) {
            size_t length = strlen(names[each]) + 1;
            parts[used++] = (struct iovec){(void *)names[each], length};
            header.names += length;
            size += length;
        }
    for (int each = 0; each < count; each++)
        if (data[each].iov_len) {
            parts[used++] = data[each];
            size += data[each].iov_len;
        }
    header.size = size;
    header.operation = operation;
    header.durable = durable;
    header.inode = inode;
    header.a = a;
    header.b = b;
    int result = 0;
    for (int from = 0; from < used && result >= 0;) {  /* writev takes 1,024 parts; nobody else appends here */
        int some = used - from > 1024 ? 1024 : used - from;
        size_t wanted = 0;
        for (int each = from; each < from + some; each++) wanted += parts[each].iov_len;
        ssize_t written = syscall(SYS_writev, log_fd, parts + from, some);
        if (written != (ssize_t)wanted) result = -1;
        from += some;
    }
    if (result < 0) die("cannot write the log");
}

/* The inode of a descriptor whose file is below the root; 0 for others. */
static uint64_t watched(int fd) {
    if (!log_prefix) return 0;
    int kept = errno;
    struct stat about;
    uint64_t inode = 0;
    if (fstat(fd, &about) == 0 && (S_ISREG(about.st_mode) || S_ISDIR(about.st_mode))) {
        char link[64], path[PATH_MAX];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length > 0) {
            path[length] = 0;
            if (!strncmp(path, root, root_length) || (length == (ssize_t)root_length - 1 && !strncmp(path, root, length)))
                inode = about.st_ino;
        }
    }
    errno = kept;
    return inode;
}

/* The path without the root in `out`; 0 where it is not below it. */
static int below(int directory, const char *path, char *out) {
    if (!log_prefix || !path) return 0;
    char whole[PATH_MAX * 2];
    if (path[0] == '/')
        snprintf(whole, sizeof whole, "%s", path);
    else {
        char base[PATH_MAX];
        if (directory == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
            ssize_t length = readlink(link, base, sizeof base - 1);
            if (length < 0) return 0;
            base[length] = 0;
        }
        snprintf(whole, sizeof whole, "%s/%s", base, path);
    }
    if (strncmp(whole, root, root_length)) return 0;
    snprintf(out, PATH_MAX, "%s", whole + root_length);
    return 1;
}

static void acquire(void) { pthread_mutex_lock(&lock); }
static void release(void) {
    int kept = errno;
    pthread_mutex_unlock(&lock);
    errno = kept;
}

/* ---- opening */

static int opened(int directory, const char *path, int flags, mode_t mode) {
    char name[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !below(directory, path, name))
        return syscall(SYS_openat, directory, path, flags, mode);
    if ((flags & O_TMPFILE) == O_TMPFILE) die("O_TMPFILE is not known here");
    acquire();
    struct stat about;
    int was = fstatat(directory, path, &about, 0) == 0;
    int fd = syscall(SYS_openat, directory, path, flags, mode);
    if (fd >= 0 && fstat(fd, &about) == 0) {
        if (!was)
            record(CREATE, 0, about.st_ino, 0, 0, name, NULL, NULL, 0);
        else if (flags & O_TRUNC)
            record(TRUNCATE, 0, about.st_ino, 0, 0, NULL, NULL, NULL, 0);
    }
    release();
    return fd;
}

#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, int); \
        va_end(rest); \
        return opened(directory, path, flags, mode); \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, int); \
        va_end(rest); \
        return opened(AT_FDCWD, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
OPEN(open)
OPEN(open64)
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* ---- content */

static int all_zero(const struct iovec *data, int count) {
    for (int each = 0; each < count; each++) {
        const char *bytes = data[each].iov_base;
        size_t length = data[each].iov_len;
        if (length && (bytes[0] || memcmp(bytes, bytes + 1, length - 1))) return 0;
    }
    return 1;
}

/* offset < 0: where the descriptor stands. */
static ssize_t wrote(int fd, const struct iovec *data, int count, off_t offset) {
    uint64_t inode = watched(fd);
    if (!inode) return offset < 0 ? syscall(SYS_writev, fd, data, count) : syscall(SYS_pwritev, fd, data, count, offset, 0);
    if (count > 1024) die("too many buffers");
    acquire();
    ssize_t written;
    int flags = fcntl(fd, F_GETFL);
    if (offset < 0) {
        written = syscall(SYS_writev, fd, data, count);
        offset = lseek(fd, 0, SEEK_CUR) - (written > 0 ? written : 0);
    } else
        written = syscall(SYS_pwritev, fd, data, count, offset, 0);
    if (written > 0) {
        struct iovec shown[1024];
        size_t left = written;
        int used = 0;
        for (; used < count && left; used++) {
            shown[used] = data[used];
            if (shown[used].iov_len > left) shown[used].iov_len = left;
            left -= shown[used].iov_len;
        }
        int zeroes = written >= 4096 && all_zero(shown, used);
        record(zeroes ? ZEROES : WRITE, (flags & O_DSYNC) != 0, inode, offset, written, NULL, NULL, shown, zeroes ? 0 : used);
    }
    release();
    return written;
}

ssize_t write(int fd, const void *bytes, size_t size) {
    if (!watched(fd)) return syscall(SYS_write, fd, bytes, size);
    struct iovec data = {(void *)bytes, size};
    return wrote(fd, &data, 1, -1);
}
ssize_t writev(int fd, const struct iovec *data, int count) { return wrote(fd, data, count, -1); }
#define PWRITE(name) \
    ssize_t name(int fd, const void *bytes, size_t size, off_t offset) { \
        struct iovec data = {(void *)bytes, size}; \
        return wrote(fd, &data, 1, offset); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)
ssize_t pwritev(int fd, const struct iovec *data, int count, off_t offset) { return wrote(fd, data, count, offset); }
ssize_t pwritev64(int fd, const struct iovec *data, int count, off_t offset) { return wrote(fd, data, count, offset); }
ssize_t pwritev2(int fd, const struct iovec *data, int count, off_t offset, int flags) {
    if (flags && watched(fd)) die("pwritev2 with flags is not known here");
    return wrote(fd, data, count, offset);
}
ssize_t pwritev64v2(int fd, const struct iovec *data, int count, off_t offset, int flags) {
    return pwritev2(fd, data, count, offset, flags);
}

static int sized(int fd, off_t size) {
    uint64_t inode = watched(fd);
    if (!inode) return syscall(SYS_ftruncate, fd, size);
    acquire();
    int result = syscall(SYS_ftruncate, fd, size);
    if (!result) record(TRUNCATE, 0, inode, size, 0, NULL, NULL, NULL, 0);
    release();
    return result;
}
int ftruncate(int fd, off_t size) { return sized(fd, size); }
int ftruncate64(int fd, off_t size) { return sized(fd, size); }

/* Room alone changes nothing that can be read; a size that grows is a truncate upward. */
static int allocated(int fd, int mode, off_t offset, off_t length) {
    uint64_t inode = watched(fd);
    if (!inode) return syscall(SYS_fallocate, fd, mode, offset, length);
    if (mode) die("fallocate with a mode is not known here");
    acquire();
    struct stat before, after;
    fstat(fd, &before);
    int result = syscall(SYS_fallocate, fd, 0, offset, length);
    if (!result && !fstat(fd, &after) && after.st_size != before.st_size)
        record(TRUNCATE, 0, inode, after.st_size, 0, NULL, NULL, NULL, 0);
    release();
    return result;
}
int fallocate(int fd, int mode, off_t offset, off_t length) { return allocated(fd, mode, offset, length); }
int fallocate64(int fd, int mode, off_t offset, off_t length) { return allocated(fd, mode, offset, length); }
static int allocated_posix(int fd, off_t offset, off_t length) {
    int kept = errno, result = allocated(fd, 0, offset, length) ? errno : 0;
    errno = kept;
    return result;
}
int posix_fallocate(int fd, off_t offset, off_t length) { return allocated_posix(fd, offset, length); }
int posix_fallocate64(int fd, off_t offset, off_t length) { return allocated_posix(fd, offset, length); }

#define UNKNOWN(type, name, parameters, arguments, fd, call) \
    type name parameters { \
        if (watched(fd)) die(#name " is not known here"); \
        return syscall call; \
    }
UNKNOWN(ssize_t, sendfile, (int to, int from, off_t *offset, size_t size), , to, (SYS_sendfile, to, from, offset, size))
UNKNOWN(ssize_t, sendfile64, (int to, int from, off_t *offset, size_t size), , to, (SYS_sendfile, to, from, offset, size))
UNKNOWN(ssize_t, copy_file_range, (int from, off_t *at, int to, off_t *where, size_t size, unsigned flags), , to,
        (SYS_copy_file_range, from, at, to, where, size, flags))

/* ---- syncs */

static void delay(void) {
    int64_t least = now()->sync_least_us, most = now()->sync_most_us;
    if (most <= 0) return;
    int64_t wait_us = least + (most > least ? random() % (most - least + 1) : 0);
    struct timespec time = {wait_us / 1000000, wait_us % 1000000 * 1000};
    syscall(SYS_nanosleep, &time, NULL);
}

static int synced(int fd, long call) {
    uint64_t inode = watched(fd);
    if (!inode) {
        if (!log_prefix) delay();
        return syscall(call, fd);
    }
    acquire();
    uint64_t number = ++syncs;
    record(SYNC_BEGIN, 0, inode, number, 0, NULL, NULL, NULL, 0);
    release();
    delay();
    int result = now()->real_syncs ? syscall(call, fd) : 0;
    acquire();
    if (!result) record(SYNC_END, 0, inode, number, 0, NULL, NULL, NULL, 0);
    release();
    return result;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

/* ---- names */

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    char first[PATH_MAX], second[PATH_MAX];
    int one = below(from, old, first), other = below(to, new, second);
    if (!one && !other) return syscall(SYS_renameat2, from, old, to, new, flags);
    if (!one || !other) die("a rename over the root's edge");
    if (flags) die("renameat2 with flags is not known here");
    acquire();
    int result = syscall(SYS_renameat2, from, old, to, new, 0);
    if (!result) record(RENAME, 0, 0, 0, 0, first, second, NULL, 0);
    release();
    return result;
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    char first[PATH_MAX], second[PATH_MAX];
    int one = below(from, old, first), other = below(to, new, second);
    if (!one && !other) return syscall(SYS_linkat, from, old, to, new, flags);
    if (!one || !other) die("a link over the root's edge");
    acquire();
    int result = syscall(SYS_linkat, from, old, to, new, flags);
    if (!result) record(LINK, 0, 0, 0, 0, first, second, NULL, 0);
    release();
    return result;
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int directory, const char *path, int flags) {
    char name[PATH_MAX];
    if (!below(directory, path, name)) return syscall(SYS_unlinkat, directory, path, flags);
    acquire();
    int result = syscall(SYS_unlinkat, directory, path, flags);
    if (!result) record(UNLINK, 0, 0, 0, 0, name, NULL, NULL, 0);
    release();
    return result;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int directory, const char *path, mode_t mode) {
    char name[PATH_MAX];
    if (!below(directory, path, name)) return syscall(SYS_mkdirat, directory, path, mode);
    acquire();
    struct stat about;
    int result = syscall(SYS_mkdirat, directory, path, mode);
    if (!result && !fstatat(directory, path, &about, 0)) record(MKDIR, 0, about.st_ino, 0, 0, name, NULL, NULL, 0);
    release();
    return result;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int symlinkat(const char *target, int directory, const char *path) {
    char name[PATH_MAX];
    if (below(directory, path, name)) die("symlinks are not known here");
    return syscall(SYS_symlinkat, target, directory, path);
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

/* ---- the wall clock: what is told of it, and until when somebody waits by it */

static void moved(struct timespec *time, int64_t by_ns) {
    int64_t all = (int64_t)time->tv_sec * 1000000000 + time->tv_nsec + by_ns;
    time->tv_sec = all / 1000000000;
    time->tv_nsec = all % 1000000000;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, time);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) moved(time, now()->clock_offset_ns);
    return result;
}
int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    (void)zone;
    struct timespec precise;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    if (!result) *time = (struct timeval){precise.tv_sec, precise.tv_nsec / 1000};
    return result;
}
time_t time(time_t *out) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (out) *out = precise.tv_sec;
    return precise.tv_sec;
}

/* gRPC waits until a moment of the wall clock, which the kernel reads as its own. */
long syscall(long number, ...) {
    REAL(long, "syscall", long, ...);
    va_list rest;
    va_start(rest, number);
    long a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long);
    long d = va_arg(rest, long), e = va_arg(rest, long), f = va_arg(rest, long);
    va_end(rest);
    struct timespec until;
    if (number == SYS_futex && (b & FUTEX_CLOCK_REALTIME) && d) {
        until = *(struct timespec *)d;
        moved(&until, -now()->clock_offset_ns);
        d = (long)&until;
    }
    return real(number, a, b, c, d, e, f);
}
