/* Preloaded into the daemon: counts the calls by which a process changes files, ends it at the chosen one, or makes
 * syncs of folders fail. The daemon makes system calls both through libc and without it, so a seccomp filter traps them
 * and a signal handler carries them out.
 *
 * FAULTS_KILL_AT=N     SIGKILL instead of the N-th change; a write gets half of its bytes out first
 * FAULTS_REPORT=FILE   one line per change: its number, the call, the name it was given
 * FAULTS_SYNC=FILE     while this file exists, fsync of a folder fails with EIO
 *
 * A sync is no place to be killed at: it changes nothing that a killed process leaves behind. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* The one place whose system calls pass the filter: passage(number, five arguments). */
long passage(long number, long a, long b, long c, long d, long e);
extern char passage_end[];

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
__asm__(".text\n.hidden passage\n.globl passage\n.type passage,@function\npassage:\n"
        "mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\nmov %r9,%r8\nsyscall\n"
        ".hidden passage_end\n.globl passage_end\npassage_end:\nret\n");
#define ARGUMENT(context, n) ((context)->uc_mcontext.gregs[registers[n]])
#define RESULT(context) ((context)->uc_mcontext.gregs[REG_RAX])
static const int registers[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8};
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
__asm__(".text\n.hidden passage\n.globl passage\n.type passage,%function\npassage:\n"
        "mov x8,x0\nmov x0,x1\nmov x1,x2\nmov x2,x3\nmov x3,x4\nmov x4,x5\nsvc #0\n"
        ".hidden passage_end\n.globl passage_end\npassage_end:\nret\n");
#define ARGUMENT(context, n) ((context)->uc_mcontext.regs[n])
#define RESULT(context) ((context)->uc_mcontext.regs[0])
#else
#error "which registers hold the arguments of a system call here?"
#endif

static atomic_long changes;
static long kill_at;
static int report = -1;
static const char *failing_syncs;

static struct {
    long number;
    const char *name;
    int path; /* which argument is the name, -1 for none */
} const calls[] = {
    {SYS_openat, "create", 1},   {SYS_mkdirat, "mkdir", 1},   {SYS_write, "write", -1},
    {SYS_renameat2, "rename", 3}, {SYS_unlinkat, "unlink", 1}, {SYS_linkat, "link", 3},
    {SYS_fsync, "sync", -1},      {SYS_fdatasync, "sync", -1},
#ifdef SYS_renameat
    {SYS_renameat, "rename", 3},
#endif
#ifdef SYS_open
    {SYS_open, "create", 0},      {SYS_mkdir, "mkdir", 0},     {SYS_rename, "rename", 1},
    {SYS_unlink, "unlink", 0},    {SYS_link, "link", 1},
#endif
};
enum { CALLS = sizeof calls / sizeof *calls };

static int is_change(long number, ucontext_t *context) {
    struct stat file;
    if (number == SYS_openat) return (ARGUMENT(context, 2) & O_CREAT) != 0;
#ifdef SYS_open
    if (number == SYS_open) return (ARGUMENT(context, 1) & O_CREAT) != 0;
#endif
    if (number == SYS_write) return fstat((int)ARGUMENT(context, 0), &file) == 0 && S_ISREG(file.st_mode);
    return number != SYS_fsync && number != SYS_fdatasync;
}

static int is_failing_sync(long number, ucontext_t *context) {
    struct stat file;
    return number == SYS_fsync && failing_syncs && access(failing_syncs, F_OK) == 0 &&
           fstat((int)ARGUMENT(context, 0), &file) == 0 && S_ISDIR(file.st_mode);
}

static void trapped(int signal, siginfo_t *info, void *opaque) {
    (void)signal;
    int saved = errno;
    ucontext_t *context = opaque;
    long number = info->si_syscall, argument[5];
    for (int i = 0; i < 5; i++) argument[i] = (long)ARGUMENT(context, i);
    if (is_change(number, context)) {
        long change = atomic_fetch_add(&changes, 1) + 1;
        if (report >= 0) {
            char line[300];
            int call = 0;
            while (call < CALLS - 1 && calls[call].number != number) call++;
            const char *path = calls[call].path < 0 ? "" : (const char *)argument[calls[call].path];
            int length = snprintf(line, sizeof line, "%ld %s %.200s\n", change, calls[call].name, path);
            passage(SYS_write, report, (long)line, length, 0, 0);
        }
        if (change == kill_at) {
            if (number == SYS_write) passage(number, argument[0], argument[1], argument[2] / 2, 0, 0);
            kill(getpid(), SIGKILL);
        }
    }
    if (is_failing_sync(number, context)) {
        RESULT(context) = -EIO;
    } else {
        RESULT(context) = passage(number, argument[0], argument[1], argument[2], argument[3], argument[4]);
    }
    errno = saved;
}

static void fail(const char *what) {
    perror(what);
    _exit(99);
}

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("FAULTS_KILL_AT"), *path = getenv("FAULTS_REPORT");
    kill_at = text ? atol(text) : 0;
    failing_syncs = getenv("FAULTS_SYNC");
    if (path && (report = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0) fail(path);

    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO};
    if (sigaction(SIGSYS, &action, NULL) != 0) fail("sigaction");

    struct sock_filter filter[8 + 2 * CALLS];
    int n = 0;
    uint64_t end = (uint64_t)(uintptr_t)passage_end;
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 0, 4);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer));
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)end, 0, 3);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4);
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(end >> 32), 0, 1);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < CALLS; i++) {
        filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[i].number, (unsigned char)(CALLS - i), 0);
    }
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) fail("no_new_privs");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) fail("seccomp");
}
