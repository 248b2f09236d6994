/* Moves the wall clock of a program that asks the kernel for the time without the C library, as those in Go do.
 *
 *     clock COMMAND...     CAIRN_SHIM_CONTROL names a file that begins with the offset in ns (int64), as for shim.c
 *
 * The command takes this process's place, so it has its pid and gets its signals; a child of it is its tracer, with
 * which it ends. Two things make every look at the wall clock stop at the tracer. The kernel's own code for it, the
 * vDSO, is hidden from the program where it looks for it at its start, so it makes system calls; and a filter reports
 * those that ask clock_gettime for CLOCK_REALTIME, which is how Go asks. The tracer answers them in the kernel's place.
 * Monotonic clocks, which timers and leases go by, are as they were. For x86-64.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { END_OF_AUXV = 0, IGNORED = 1, VDSO = 33 };
enum { NS_PER_S = 1000000000 };

static volatile int64_t *offset_ns;

static void die(const char *what) {
    dprintf(2, "clock: %s: %s\n", what, strerror(errno));
    _exit(97);
}

static void open_control(void) {
    const char *name = getenv("CAIRN_SHIM_CONTROL");
    int fd = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    offset_ns = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *offset_ns, PROT_READ, MAP_SHARED, fd, 0);
    if (offset_ns == MAP_FAILED) die("cannot map CAIRN_SHIM_CONTROL");
}

/* Of this process and what it becomes: report clock_gettime(CLOCK_REALTIME), allow all else. */
static void install_filter(void) {
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 5),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clock_gettime, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CLOCK_REALTIME, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof program / sizeof *program, program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) die("seccomp");
}

static uint64_t peek(pid_t thread, uint64_t at) {
    errno = 0;
    uint64_t word = ptrace(PTRACE_PEEKDATA, thread, at, 0);
    if (errno) die("cannot read the stack of the program");
    return word;
}

/* Behind an exec: argc, arguments, 0, environment, 0, then pairs, one of which says where the vDSO is. */
static void hide_vdso(pid_t thread) {
    struct user_regs_struct registers;
    if (ptrace(PTRACE_GETREGS, thread, 0, &registers)) die("cannot read registers");
    uint64_t at = registers.rsp + 8 * (peek(thread, registers.rsp) + 2);
    while (peek(thread, at)) at += 8;
    for (at += 8; peek(thread, at) != END_OF_AUXV; at += 16)
        if (peek(thread, at) == VDSO && ptrace(PTRACE_POKEDATA, thread, at, IGNORED)) die("cannot hide the vDSO");
}

/* The call is not made: its result is put where it was wanted. A thread that was killed meanwhile needs none. */
static void answer(pid_t thread) {
    struct user_regs_struct registers;
    struct timespec now;
    if (ptrace(PTRACE_GETREGS, thread, 0, &registers)) return;
    clock_gettime(CLOCK_REALTIME, &now);
    int64_t ns = (int64_t)now.tv_sec * NS_PER_S + now.tv_nsec + *offset_ns;
    now = (struct timespec){ns / NS_PER_S, ns % NS_PER_S};
    struct iovec from = {&now, sizeof now}, to = {(void *)registers.rsi, sizeof now};
    registers.rax = process_vm_writev(thread, &from, 1, &to, 1, 0) == sizeof now ? 0 : -EFAULT;
    registers.orig_rax = -1;
    ptrace(PTRACE_SETREGS, thread, 0, &registers);
}

static void trace(void) {
    int status;
    pid_t thread;
    while ((thread = waitpid(-1, &status, __WALL)) > 0) {
        if (!WIFSTOPPED(status)) continue;
        int event = status >> 16, signal = WSTOPSIG(status);
        if (event == PTRACE_EVENT_STOP && (signal == SIGSTOP || signal == SIGTSTP)) {
            ptrace(PTRACE_LISTEN, thread, 0, 0); /* it was stopped, and stays so until SIGCONT */
            continue;
        }
        if (event == PTRACE_EVENT_SECCOMP) answer(thread);
        if (event == PTRACE_EVENT_EXEC) hide_vdso(thread);
        ptrace(PTRACE_CONT, thread, 0, event ? 0 : signal);
    }
}

int main(int count, char **arguments) {
    int ready[2];
    char byte;
    if (count < 2) die("usage: clock COMMAND...");
    open_control();
    if (pipe2(ready, O_CLOEXEC)) die("pipe");
    pid_t program = getpid(), tracer = fork();
    if (tracer < 0) die("fork");
    if (!tracer) {
        long options = PTRACE_O_TRACESECCOMP | PTRACE_O_TRACEEXEC | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK
                       | PTRACE_O_TRACEVFORK | PTRACE_O_EXITKILL;
        if (ptrace(PTRACE_SEIZE, program, 0, options)) die("cannot trace");
        if (write(ready[1], "", 1) != 1) die("pipe");
        trace();
        _exit(0);
    }
    close(ready[1]);
    if (read(ready[0], &byte, 1) != 1) die("the tracer ended");
    install_filter();
    execvp(arguments[1], arguments + 1);
    die(arguments[1]);
}
