// Products of matrices by all threads, none of which waits for another one as long as there is other work.
//
// Each C is computed in units, some rows of some columns, and each unit in stages, one for each block of B.  A thread
// takes a unit that no other is at, the one that is least far.  So a thread that loses its core holds up one unit, while
// the others go on with the rest.  Each thread packs the blocks of B for itself: to read what another core has packed
// takes about as long as to pack it.

#pragma once

#include "gemm.h"

// Some columns of one C, for which a thread packs B, and their units of some rows.
struct Group {
    Gemm product;
    int64_t stages, units;
    std::atomic<int64_t>* states;  // of each unit: 2·(complete stages), and 1 while a thread is at the next
};

// The columns of a group: as many groups as make the threads pack least, or 1.
inline int64_t group_columns(const Gemm& g, int64_t threads, bool whole_rows) {
    const int64_t panels = parts_of(g.N, WIDTH);
    const int64_t least = std::llround(std::sqrt(static_cast<double>(threads) * g.N / g.M));
    return parts_of(panels, whole_rows ? 1 : std::clamp<int64_t>(least, 1, std::min(threads, panels))) * WIDTH;
}

template <class Epilogue>
class SharedGemms {
  public:
    SharedGemms(const std::vector<Gemm>& products, const Epilogue& epilogue, bool whole_rows) : epilogue(epilogue) {
        for (const Gemm& g : products) {
            if (g.M == 0 || g.N == 0) continue;
            const int64_t columns = group_columns(g, omp_get_max_threads(), whole_rows);
            for (int64_t part = 0; part < parts_of(g.N, columns); part++) {
                const Gemm own = g.of_columns(part_of(g.N, columns, part));
                groups.push_back({own, own.stages(), own.units(), nullptr});
                units += own.units();
                block_size = std::max(block_size, own.block_size());
            }
        }
        states = std::vector<std::atomic<int64_t>>(units);
        std::atomic<int64_t>* next = states.data();
        for (Group& group : groups) {
            group.states = next;
            next += group.units;
        }
    }

    // The work of a thread.
    void work(const Team& team) {
        if (groups.empty()) return;
        int64_t group = 0, first = units * team.member() / team.size;
        for (; first >= groups[group].units; group++) first -= groups[group].units;
        Task task{group, first, 0}, packed{-1, 0, 0};
        float* const block = scratch<0>(block_size);
        for (;;) {
            team.spread();
            wait_until([&] { return find(first, task) ? take(task) : task.unit < 0; });
            if (task.unit < 0) return;
            const Group& own = groups[task.group];
            const Stage stage(own.product, task.stage);
            if (packed.group != task.group || packed.stage != task.stage) pack(own.product, stage, block);
            compute_unit(own.product, stage, task.unit, block, epilogue);
            own.states[task.unit] = 2 * task.stage + 2;
            packed = task;
        }
    }

  private:
    struct Task {
        int64_t group, unit, stage;
    };

    bool take(const Task& task) const {
        int64_t state = 2 * task.stage;
        return groups[task.group].states[task.unit].compare_exchange_strong(state, state + 1);
    }

    // Find a task, in the group of the last one if it has any, for whose columns the thread has packed B.  False where
    // other threads are at all units that have a stage left; then `unit` is −1 where no unit has.
    bool find(int64_t first, Task& task) const {
        bool left = false;
        const int64_t count = groups.size();
        for (int64_t i = 0, group = task.group; i < count; i++, group = (group + 1) % count) {
            const Task found = least_far(group, first, left);
            if (found.unit < 0) continue;
            task = found;
            return true;
        }
        task.unit = left ? 0 : -1;
        return false;
    }

    // The unit of a group that is least far, of those that no thread is at, from unit `first` on; its number is −1 where
    // there is none.  `left`: set where a unit has a stage left.
    Task least_far(int64_t group, int64_t first, bool& left) const {
        const Group& own = groups[group];
        Task found{group, -1, own.stages};
        int64_t unit = first % own.units;
        for (int64_t i = 0; i < own.units; i++, unit = unit + 1 < own.units ? unit + 1 : 0) {
            const int64_t state = own.states[unit].load(std::memory_order_relaxed);
            left |= state < 2 * own.stages - 1;
            if (!(state & 1) && state < 2 * found.stage) found = {group, unit, state >> 1};
        }
        return found;
    }

    const Epilogue& epilogue;
    std::vector<Group> groups;
    std::vector<std::atomic<int64_t>> states;
    int64_t units = 0, block_size = 0;
};

// epilogue: see compute_unit; with whole_rows, the last one of a row is called when all its columns are complete.
// Called outside of a parallel region.
template <class Epilogue>
void gemms_shared(const std::vector<Gemm>& products, const Epilogue& epilogue, bool whole_rows = false) {
    SharedGemms<Epilogue> shared(products, epilogue, whole_rows);
    in_threads([&](const Team& team) { shared.work(team); });
}
