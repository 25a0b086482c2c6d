// Work in parts, which threads take as they become free: one that loses its core to another process holds up no more
// than the part it is at.
//
// What is summed up is summed by part, and the parts depend on the sizes alone.  So a result is the same bit for bit
// whoever computes which part, and on any number of threads.

#pragma once

#include <omp.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "common.h"

constexpr int CHECKS = 100;  // before a thread stops to wait for another: some 5 us

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether ready() has become true soon, as it does unless the thread that makes it true has lost its core.
template <class Ready>
bool soon(Ready ready) {
    for (int check = 0; check < CHECKS; check++) {
        if (ready()) return true;
        pause_core();
    }
    return ready();
}

// Wait until ready(), which another thread makes true.  A thread that sleeps lets the system move the other one to its
// core.
template <class Ready>
void wait_until(Ready ready) {
    while (!soon(ready)) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// The threads of a parallel region.
class Team {
  public:
    Team() : size(omp_get_max_threads()), cpus(size) {
        for (auto& cpu : cpus) cpu = -1;
    }

    static int64_t member() { return omp_get_thread_num(); }

    // Leave this CPU to another thread of the team that is on it, if the system put both there: it takes a thread that
    // waits for one that works, and so may run two of them by turns on one CPU.
    void spread() const {
#ifdef __linux__
        const int cpu = sched_getcpu();
        if (cpus[member()].exchange(cpu, std::memory_order_relaxed) == cpu) return;
        for (int64_t other = 0; other < size; other++)
            if (other != member() && cpus[other] == cpu) return leave();
#endif
    }

    const int64_t size;

  private:
#ifdef __linux__
    void leave() const {
        cpu_set_t allowed, others;
        if (sched_getaffinity(0, sizeof(allowed), &allowed)) return;
        others = allowed;
        for (const auto& cpu : cpus)
            if (cpu >= 0) CPU_CLR(cpu, &others);
        if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others)) return;
        sched_setaffinity(0, sizeof(allowed), &allowed);
        cpus[member()] = sched_getcpu();
    }
#endif

    mutable std::vector<std::atomic<int>> cpus;  // that each thread was on last
};

// work(team) by all threads.
template <class Work>
void in_threads(Work work) {
    const Team team;
#pragma omp parallel
    work(team);
}

// The parts [0, count), and which of them are taken.  A thread takes those of its own range first, whose rows its cache
// may hold from the kernel before, then what others have left.
class Parts {
  public:
    // backwards: the last one first.
    Parts(int64_t count, int64_t threads, bool backwards = false)
        : count(count), backwards(backwards), owners(threads) {}

    // The next part for a thread, or -1 where all are taken.
    int64_t take(const Team& team) {
        team.spread();
        for (int64_t i = 0, owner = team.member(); i < team.size; i++, owner = (owner + 1) % team.size) {
            const Range range = range_of(count, team.size, owner);
            const int64_t number = owners[owner].taken.fetch_add(1, std::memory_order_relaxed);
            if (number < range.end - range.begin) return backwards ? range.end - 1 - number : range.begin + number;
        }
        return -1;
    }

  private:
    struct alignas(64) Owner {
        std::atomic<int64_t> taken{0};  // of its range, and how often it was asked for more
    };

    int64_t count;
    bool backwards;
    std::vector<Owner> owners;
};

// work(part) for each part of [0, count), by all threads.
template <class Work>
void in_parts(int64_t count, Work work) {
    Parts parts(count, omp_get_max_threads());
    in_threads([&](const Team& team) {
        for (int64_t part; (part = parts.take(team)) >= 0;) work(part);
    });
}

// Parts of `size` of [0, count), the last one smaller; the range of one.
constexpr int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline Range part_of(int64_t count, int64_t size, int64_t part) {
    return {part * size, std::min(count, (part + 1) * size)};
}

// Sums over all rows: each part adds up its own rows, then write() adds the parts' sums.
class ColumnSums {
  public:
    ColumnSums(int64_t parts, int64_t width) : width(width), sums(parts * width, 0.0f) {}

    float* of(int64_t part) { return sums.data() + part * width; }

    void write(float* out) const {
        std::fill(out, out + width, 0.0f);
        for (size_t start = 0; start < sums.size(); start += width)
#pragma omp simd
            for (int64_t i = 0; i < width; i++) out[i] += sums[start + i];
    }

  private:
    int64_t width;
    std::vector<float> sums;
};
