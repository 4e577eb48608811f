/* Makes the nth call that changes files below a folder fail, or be the process's last; takes a file away, or puts
 * another in its place, before the nth opening for reading there; and lets the clock jump.
 *
 * Loaded by LD_PRELOAD, steered by ctypes: `faults_arm`, `faults_arm_reads` and `faults_arm_clock` set what happens,
 * `faults_count` and `faults_num_reads` say how many such calls there were. Calls elsewhere go through untouched.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long armed, count;
static int number, lasting;
static char hit[64];
static long armed_read, num_reads, clock_calls, clock_jump;
static int instead;

/* Linux interrupts none of these, nor does a full disk keep a file from being removed. */
static int never(const char *call) {
    if (number == ENOSPC) return !strcmp(call, "unlink");
    return number == EINTR && strcmp(call, "open") && strcmp(call, "write") && strcmp(call, "fsync") && strcmp(call, "truncate");
}

/* what: 0 counts only; an errno; -1 is SIGKILL. stays: every later call fails too, as on a full disk. */
void faults_arm(const char *below, long nth, int what, int stays) {
    snprintf(folder, sizeof folder, "%s", below);
    armed = nth;
    number = what;
    lasting = stays;
    count = num_reads = armed_read = clock_jump = 0;
    hit[0] = 0;
}

/* After faults_arm. replaces: 0 removes the file that is about to be read, 1 puts .other/NAME in its place. */
void faults_arm_reads(long nth, int replaces) {
    armed_read = nth;
    instead = replaces;
}

/* Every second look at the clock is so many seconds off. */
void faults_arm_clock(long seconds) { clock_jump = seconds; }

long faults_count(void) { return count; }
long faults_num_reads(void) { return num_reads; }
const char *faults_hit(void) { return hit; }

static int watched(int at, const char *path) {
    char full[PATH_MAX], link[64];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') return strncmp(path, folder, strlen(folder)) == 0;
    if (at == AT_FDCWD) {
        if (!getcwd(full, sizeof full)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, full, sizeof full - 1);
        if (length < 0) return 0;
        full[length] = 0;
    }
    strncat(full, "/", sizeof full - strlen(full) - 1);
    return strncmp(full, folder, strlen(folder)) == 0;
}

static int watched_file(int descriptor) {
    char link[64], full[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, full, sizeof full - 1);
    if (length < 0) return 0;
    full[length] = 0;
    return strncmp(full, folder, strlen(folder)) == 0;
}

static int fails(const char *call) {
    count++;
    if (!number || never(call) || (lasting ? count < armed : count != armed)) return 0;
    if (!hit[0]) snprintf(hit, sizeof hit, "%s", call);
    if (number == -1) kill(getpid(), SIGKILL);
    errno = number;
    return 1;
}

static void before_reading(int at, const char *path) {
    struct stat status;
    char other[PATH_MAX + 8 + NAME_MAX];
    if (!watched(at, path) || strstr(path, "/.") || fstatat(at, path, &status, 0) || !S_ISREG(status.st_mode)) return;
    if (++num_reads != armed_read) return;
    const char *name = strrchr(path, '/');
    name = name ? name + 1 : path;
    snprintf(hit, sizeof hit, "%s", name);
    if (!instead) {
        unlinkat(at, path, 0);
        return;
    }
    snprintf(other, sizeof other, "%s.other/%s", folder, name);
    syscall(SYS_rename, other, path);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))

int open(const char *path, int flags, ...) {
    REAL(int, "open", const char *, int, ...);
    MODE(flags)
    if (!WRITES(flags)) before_reading(AT_FDCWD, path);
    if (WRITES(flags) && watched(AT_FDCWD, path) && fails("open")) return -1;
    return real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    MODE(flags)
    if (!WRITES(flags)) before_reading(AT_FDCWD, path);
    if (WRITES(flags) && watched(AT_FDCWD, path) && fails("open")) return -1;
    return real(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    REAL(int, "openat", int, const char *, int, ...);
    MODE(flags)
    if (!WRITES(flags)) before_reading(at, path);
    if (WRITES(flags) && watched(at, path) && fails("open")) return -1;
    return real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(int, "openat64", int, const char *, int, ...);
    MODE(flags)
    if (!WRITES(flags)) before_reading(at, path);
    if (WRITES(flags) && watched(at, path) && fails("open")) return -1;
    return real(at, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
    REAL(FILE *, "fopen", const char *, const char *);
    if (!strpbrk(mode, "wa+")) before_reading(AT_FDCWD, path);
    if (strpbrk(mode, "wa+") && watched(AT_FDCWD, path) && fails("open")) return NULL;
    return real(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    REAL(FILE *, "fopen64", const char *, const char *);
    if (!strpbrk(mode, "wa+")) before_reading(AT_FDCWD, path);
    if (strpbrk(mode, "wa+") && watched(AT_FDCWD, path) && fails("open")) return NULL;
    return real(path, mode);
}
ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (watched_file(descriptor) && fails("write")) return -1;
    return real(descriptor, bytes, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int num_parts) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (watched_file(descriptor) && fails("write")) return -1;
    return real(descriptor, parts, num_parts);
}
ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (watched_file(descriptor) && fails("write")) return -1;
    return real(descriptor, bytes, size, offset);
}
int fsync(int descriptor) {
    REAL(int, "fsync", int);
    if (watched_file(descriptor) && fails("fsync")) return -1;
    return real(descriptor);
}
int ftruncate64(int descriptor, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    if (watched_file(descriptor) && fails("truncate")) return -1;
    return real(descriptor, size);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (watched(AT_FDCWD, to) && fails("rename")) return -1;
    return real(from, to);
}
int renameat(int at, const char *from, int to_at, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    if (watched(to_at, to) && fails("rename")) return -1;
    return real(at, from, to_at, to);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    if (watched(AT_FDCWD, path) && fails("mkdir")) return -1;
    return real(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    if (watched(at, path) && fails("mkdir")) return -1;
    return real(at, path, mode);
}
int chmod(const char *path, mode_t mode) {
    REAL(int, "chmod", const char *, mode_t);
    if (watched(AT_FDCWD, path) && fails("chmod")) return -1;
    return real(path, mode);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (watched(AT_FDCWD, path) && fails("unlink")) return -1;
    return real(path);
}
static long jumped(void) { return clock_jump && ++clock_calls % 2 ? clock_jump : 0; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME) now->tv_sec += jumped();
    return result;
}
time_t time(time_t *now) {
    REAL(time_t, "time", time_t *);
    time_t seconds = real(NULL) + jumped();
    if (now) *now = seconds;
    return seconds;
}
int gettimeofday(struct timeval *now, void *zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int result = real(now, zone);
    if (!result) now->tv_sec += jumped();
    return result;
}
