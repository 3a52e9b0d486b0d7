/* Preloaded into the daemon: a seccomp profile that forbids what DENY names, `prctl` or `setrlimit`, where it hardens the
 * process. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define UNLESS(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, (skip))
#define REFUSE BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

__attribute__((constructor)) static void begin(void) {
    const char *denied = getenv("DENY");
    if (!denied) return;
    struct sock_filter undumpable[] = {LOAD(nr), UNLESS(SYS_prctl, 3), LOAD(args[0]), UNLESS(PR_SET_DUMPABLE, 1), REFUSE, ALLOW};
    /* Only where there is a new limit: reading one is nobody's business here. */
    struct sock_filter limit[] = {LOAD(nr), UNLESS(SYS_prlimit64, 5), LOAD(args[1]), UNLESS(RLIMIT_CORE, 3),
                                  LOAD(args[2]), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0), REFUSE, ALLOW};
    int prctl_too = strcmp(denied, "prctl") == 0;
    struct sock_fprog program = {
        .len = (unsigned short)(prctl_too ? sizeof undumpable / sizeof *undumpable : sizeof limit / sizeof *limit),
        .filter = prctl_too ? undumpable : limit,
    };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        perror("seccomp");
        _exit(99);
    }
}
