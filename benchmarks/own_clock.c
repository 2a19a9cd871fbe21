/* Preloaded (own_clock.py): the time of day is off by the seconds in the file $OWN_CLOCK, which is
   mapped, so that it may be stepped. All other clocks, and what waits on them, are left alone. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset_s;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void prepare(void) {
    const char *path = getenv("OWN_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
        void *mapped = mmap(NULL, sizeof *offset_s, PROT_READ, MAP_SHARED, file, 0);
        if (mapped != MAP_FAILED) offset_s = mapped;
        close(file);
    }
}

static int64_t offset(void) { return offset_s ? *offset_s : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real_gettime) real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real_gettime(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int failed = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

/* Waits until a time of day: the kernel knows another one. A condition may have been made for the
   monotonic clock, whose seconds since the start of the machine are far fewer than since 1970. */

static clockid_t kernels(const struct timespec *until, struct timespec *shifted) {
    *shifted = *until;
    if (until->tv_sec < 1000000000) return CLOCK_MONOTONIC;
    shifted->tv_sec -= offset();
    return CLOCK_REALTIME;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                           const struct timespec *until) {
    struct timespec shifted;
    clockid_t clock = kernels(until, &shifted);
    return pthread_cond_clockwait(condition, mutex, clock, &shifted);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    struct timespec shifted;
    clockid_t clock = kernels(until, &shifted);
    return pthread_mutex_clocklock(mutex, clock, &shifted);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    struct timespec shifted;
    clockid_t clock = kernels(until, &shifted);
    return sem_clockwait(semaphore, clock, &shifted);
}
