/* Loaded before libc (LD_PRELOAD): chosen calls on chosen files fail with EIO, or end or stop the process that makes
 * them. It reaches what Python cannot: the writes of safetensors' Rust code, of torch and of every thread.
 *
 * FAULT_RULES holds one rule a line: call|rank|place|first|count|action|pattern|counter. The counter is a file that
 * grows by a byte whenever a rule fits, in any process; the calls number first to first + count - 1 are struck.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static long counted(const char *counter)
{
    long handle = syscall(SYS_openat, AT_FDCWD, counter, O_WRONLY | O_CREAT | O_APPEND, 0644);
    syscall(SYS_write, handle, ".", 1);
    long number = lseek((int)handle, 0, SEEK_END);
    close((int)handle);
    return number;
}

static int struck(const char *call, const char *path)
{
    const char *rules = getenv("FAULT_RULES");
    while (rules && *rules) {
        char line[2048], name[16], rank[8], place[16], action[16], pattern[768], counter[768];
        long first, count;
        size_t length = strcspn(rules, "\n");
        snprintf(line, sizeof line, "%.*s", (int)length, rules);
        rules += length + (rules[length] == '\n');
        if (sscanf(line, "%15[^|]|%7[^|]|%15[^|]|%ld|%ld|%15[^|]|%767[^|]|%767[^|]", name, rank, place, &first, &count,
                   action, pattern, counter) != 8)
            abort();
        const char *ours = getenv("RANK");
        if (strcmp(name, call) || fnmatch(pattern, path, 0) || (strcmp(rank, "*") && strcmp(rank, ours ? ours : "0")))
            continue;
        /* Runs are started as leaders of a session; what they fork, their data workers, are not. */
        if (!strcmp(place, "worker") && getpid() == getsid(0))
            continue;
        long number = counted(counter);
        if (number < first || number >= first + count)
            continue;
        if (!strcmp(action, "pause")) {
            kill(getpid(), SIGSTOP);
            continue;
        }
        if (strcmp(action, "eio"))
            kill(getpid(), strcmp(action, "stop") ? SIGKILL : SIGSTOP);
        errno = EIO;
        return 1;
    }
    return 0;
}

static int struck_handle(const char *call, int handle)
{
    char link[64], path[4096];
    if (!getenv("FAULT_RULES"))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return struck(call, path);
}

ssize_t read(int handle, void *data, size_t size)
{
    return struck_handle("read", handle) ? -1 : syscall(SYS_read, handle, data, size);
}

ssize_t write(int handle, const void *data, size_t size)
{
    return struck_handle("write", handle) ? -1 : syscall(SYS_write, handle, data, size);
}

ssize_t writev(int handle, const struct iovec *parts, int count)
{
    return struck_handle("write", handle) ? -1 : syscall(SYS_writev, handle, parts, count);
}

int fsync(int handle)
{
    return struck_handle("fsync", handle) ? -1 : (int)syscall(SYS_fsync, handle);
}

int rename(const char *from, const char *to)
{
    return struck("rename", from) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlink(const char *path)
{
    return struck("unlink", path) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}
