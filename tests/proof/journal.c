/*
 * Notes what a program does to the files below JOURNAL_ROOT, in the order in which it happens: preloaded, it stands between the
 * program (and the SQLite inside) and the C library. test_power_loss.py reads the journal and decides what a power loss left.
 *
 * A record is a header and its data. A write is noted when it has been done, a sync when it begins and when it has been done: what
 * was noted before a sync began is on the disk once its end is noted. Only one record is written at a time, with one append.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, SYNC_BEGINS, SYNC_ENDS, UNLINK };

struct header {
    uint32_t kind, length;
    uint64_t inode, offset, time, sync;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int journal = -1;
static char root[PATH_MAX];
static size_t root_length;
static uint64_t syncs;
static uint64_t inodes[4096]; /* By descriptor; 0 is none of ours. */

static uint64_t now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000 + (uint64_t)at.tv_nsec;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("JOURNAL"), *below = getenv("JOURNAL_ROOT");
    if (path == NULL || below == NULL || realpath(below, root) == NULL) return;
    root_length = strlen(root);
    journal = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    /* Out of the way of a program that closes what it does not know. */
    int high = fcntl(journal, F_DUPFD_CLOEXEC, 4096);
    if (high >= 0) { syscall(SYS_close, journal); journal = high; }
}

static void note_locked(uint32_t kind, uint64_t inode, uint64_t offset, uint64_t sync, const void *data, size_t length) {
    struct header header = {kind, (uint32_t)length, inode, offset, now(), sync};
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)data, length}};
    if (syscall(SYS_writev, journal, parts, 2) != (ssize_t)(sizeof header + length)) abort();
}

static void note(uint32_t kind, uint64_t inode, uint64_t offset, uint64_t sync, const void *data, size_t length) {
    pthread_mutex_lock(&lock);
    note_locked(kind, inode, offset, sync, data, length);
    pthread_mutex_unlock(&lock);
}

static int is_ours(const char *path, char *whole) {
    char folder[PATH_MAX], *slash;
    if (journal < 0) return 0;
    if (realpath(path, whole) == NULL) {
        strncpy(folder, path, sizeof folder - 1);
        folder[sizeof folder - 1] = 0;
        slash = strrchr(folder, '/');
        if (slash == NULL || slash == folder) return 0;
        *slash = 0;
        if (realpath(folder, whole) == NULL || strlen(whole) + strlen(slash + 1) + 2 > PATH_MAX) return 0;
        strcat(strcat(whole, "/"), slash + 1);
    }
    return strncmp(whole, root, root_length) == 0 && (whole[root_length] == '/' || whole[root_length] == 0);
}

static uint64_t inode_of(int fd) { return fd >= 0 && fd < 4096 ? inodes[fd] : 0; }

static int opened(const char *path, int flags, mode_t mode, int folder) {
    char whole[PATH_MAX];
    struct stat before, after;
    int ours = folder == AT_FDCWD || path[0] == '/' ? is_ours(path, whole) : 0;
    if (ours) pthread_mutex_lock(&lock);
    int existed = ours && stat(whole, &before) == 0;
    int fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (fd >= 0 && fd < 4096) inodes[fd] = 0;
    if (ours && fd >= 0 && fd < 4096 && fstat(fd, &after) == 0) {
        inodes[fd] = after.st_ino;
        if (!existed) note_locked(CREATE, after.st_ino, 0, 0, whole, strlen(whole));
        else if (flags & O_TRUNC) note_locked(TRUNCATE, after.st_ino, 0, 0, NULL, 0);
    }
    if (ours) pthread_mutex_unlock(&lock);
    return fd;
}

#define MODE(flags, last, mode)                                   \
    do {                                                          \
        if ((flags) & O_CREAT) {                    \
            va_list arguments;                                    \
            va_start(arguments, last);                            \
            mode = (mode_t)va_arg(arguments, int);                \
            va_end(arguments);                                    \
        }                                                         \
    } while (0)

int open(const char *path, int flags, ...) { mode_t mode = 0; MODE(flags, flags, mode); return opened(path, flags, mode, AT_FDCWD); }
int open64(const char *path, int flags, ...) { mode_t mode = 0; MODE(flags, flags, mode); return opened(path, flags | O_LARGEFILE, mode, AT_FDCWD); }
int openat(int folder, const char *path, int flags, ...) { mode_t mode = 0; MODE(flags, flags, mode); return opened(path, flags, mode, folder); }
int openat64(int folder, const char *path, int flags, ...) { mode_t mode = 0; MODE(flags, flags, mode); return opened(path, flags | O_LARGEFILE, mode, folder); }

/* The file and the journal in one order, whichever thread writes: a later write must not be noted before an earlier one. */
static ssize_t wrote_at(int fd, const void *data, size_t length, off64_t offset) {
    uint64_t inode = inode_of(fd);
    if (inode == 0) return syscall(SYS_pwrite64, fd, data, length, offset);
    pthread_mutex_lock(&lock);
    ssize_t done = syscall(SYS_pwrite64, fd, data, length, offset);
    if (done > 0) note_locked(WRITE, inode, (uint64_t)offset, 0, data, (size_t)done);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return wrote_at(fd, data, length, offset); }
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) { return wrote_at(fd, data, length, offset); }

ssize_t write(int fd, const void *data, size_t length) {
    uint64_t inode = inode_of(fd);
    struct stat state;
    if (inode == 0) return syscall(SYS_write, fd, data, length);
    pthread_mutex_lock(&lock);
    int appends = fcntl(fd, F_GETFL) & O_APPEND;
    off64_t offset = appends && fstat(fd, &state) == 0 ? state.st_size : lseek64(fd, 0, SEEK_CUR);
    ssize_t done = syscall(SYS_write, fd, data, length);
    if (done > 0) note_locked(WRITE, inode, (uint64_t)offset, 0, data, (size_t)done);
    pthread_mutex_unlock(&lock);
    return done;
}

static int truncated(int fd, off64_t length) {
    uint64_t inode = inode_of(fd);
    if (inode == 0) return (int)syscall(SYS_ftruncate, fd, length);
    pthread_mutex_lock(&lock);
    int failed = (int)syscall(SYS_ftruncate, fd, length);
    if (!failed) note_locked(TRUNCATE, inode, (uint64_t)length, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return failed;
}

int ftruncate(int fd, off_t length) { return truncated(fd, length); }
int ftruncate64(int fd, off64_t length) { return truncated(fd, length); }

static int synced(int fd, long call) {
    uint64_t inode = inode_of(fd);
    if (inode == 0) return (int)syscall(call, fd);
    uint64_t sync = __atomic_add_fetch(&syncs, 1, __ATOMIC_SEQ_CST);
    note(SYNC_BEGINS, inode, 0, sync, NULL, 0);
    int failed = (int)syscall(call, fd);
    if (!failed) note(SYNC_ENDS, inode, 0, sync, NULL, 0);
    return failed;
}

int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

static int unlinked(const char *path, int folder, int flags) {
    char whole[PATH_MAX];
    int ours = folder == AT_FDCWD || path[0] == '/' ? is_ours(path, whole) : 0;
    if (!ours) return (int)syscall(SYS_unlinkat, folder, path, flags);
    pthread_mutex_lock(&lock);
    int failed = (int)syscall(SYS_unlinkat, folder, path, flags);
    if (!failed) note_locked(UNLINK, 0, 0, 0, whole, strlen(whole));
    pthread_mutex_unlock(&lock);
    return failed;
}

int unlink(const char *path) { return unlinked(path, AT_FDCWD, 0); }
int unlinkat(int folder, const char *path, int flags) { return unlinked(path, folder, flags); }

int close(int fd) {
    if (fd >= 0 && fd < 4096) inodes[fd] = 0;
    return (int)syscall(SYS_close, fd);
}
