// The LAMB step on CPUs in fp32.  Arrays are dense.  ops/cpu_kernels.py compiles this file.

#include <deque>

#include "parts.h"

namespace {

constexpr int64_t BLOCK = 4096;  // elements whose squares are added in fp32; the blocks' sums are added in double
constexpr int64_t PART = 1 << 18;  // elements that a thread takes at a time

// What the threads that update one parameter know of each other.
struct Update {
    Update(int64_t size, int64_t threads)
        : parts(parts_of(size, PART)), first(parts, threads), second(parts, threads, true), weight_squares(parts),
          update_squares(parts) {}

    // ‖w‖ / ‖u‖, or 1 where one of them is 0.
    float trust_ratio() const {
        double weight_square = 0.0, update_square = 0.0;
        for (double square : weight_squares) weight_square += square;
        for (double square : update_squares) update_square += square;
        const bool usable = weight_square > 0.0 && update_square > 0.0;
        return usable ? static_cast<float>(std::sqrt(weight_square / update_square)) : 1.0f;
    }

    int64_t parts;
    Parts first, second;  // of the two passes
    std::vector<double> weight_squares, update_squares;  // of each part
    std::atomic<int64_t> summed{0};  // parts of them
};

struct Settings {
    float factor, rate, beta1, beta2, scale1, scale2, eps, decay;
};

struct Arrays {
    float* w;
    const float* g;
    float *m, *v;
};

inline float update_of(Arrays a, Settings s, int64_t i) {
    return a.m[i] * s.scale1 / (std::sqrt(a.v[i] * s.scale2) + s.eps) + s.decay * a.w[i];
}

// New moments; the squares of the weights and of u.
void first_pass(Arrays a, Settings s, Range range, double& weight_square, double& update_square) {
    for (int64_t start = range.begin; start < range.end; start += BLOCK) {
        float ww = 0.0f, uu = 0.0f;
#pragma omp simd reduction(+ : ww, uu)
        for (int64_t i = start; i < std::min(start + BLOCK, range.end); i++) {
            const float clipped = a.g[i] * s.factor;
            a.m[i] = s.beta1 * a.m[i] + (1.0f - s.beta1) * clipped;
            a.v[i] = s.beta2 * a.v[i] + (1.0f - s.beta2) * clipped * clipped;
            const float u = update_of(a, s, i);
            ww += a.w[i] * a.w[i];
            uu += u * u;
        }
        weight_square += ww;
        update_square += uu;
    }
}

void second_pass(Arrays a, Settings s, Range range, float trust_ratio) {
    const float rate = s.rate * trust_ratio;
    for (int64_t end = range.end; end > range.begin; end -= BLOCK) {
#pragma omp simd
        for (int64_t i = std::max(end - BLOCK, range.begin); i < end; i++) a.w[i] -= rate * update_of(a, s, i);
    }
}

}  // namespace

extern "C" {

// One LAMB step of `count` parameters of one group (formulas: lamb.py).  `factor` multiplies the gradients.
// u is computed twice, which is cheaper than writing and reading it.  The second pass runs backwards through a thread's
// range, since the cache still holds the end of it.
void lamb_step(float* const* weights, const float* const* gradients, float* const* first, float* const* second,
               const int64_t* sizes, int64_t count, float factor, float rate, float beta1, float beta2,
               float correction1, float correction2, float eps, float decay) {
    const Settings settings{factor, rate, beta1, beta2, 1.0f / correction1, 1.0f / correction2, eps, decay};
    const int64_t threads = omp_get_max_threads();
    std::deque<Update> updates;
    for (int64_t parameter = 0; parameter < count; parameter++) updates.emplace_back(sizes[parameter], threads);
    in_threads([&](const Team& team) {
        for (int64_t parameter = 0; parameter < count; parameter++) {
            const Arrays arrays{weights[parameter], gradients[parameter], first[parameter], second[parameter]};
            Update& own = updates[parameter];
            for (int64_t part; (part = own.first.take(team)) >= 0; own.summed++)
                first_pass(arrays, settings, part_of(sizes[parameter], PART, part), own.weight_squares[part],
                           own.update_squares[part]);
            for (int64_t part; (part = own.second.take(team)) >= 0;) {
                wait_until([&] { return own.summed == own.parts; });
                const float trust_ratio = decay == 0.0f ? 1.0f : own.trust_ratio();
                second_pass(arrays, settings, part_of(sizes[parameter], PART, part), trust_ratio);
            }
        }
    });
}

// The sum of the squares of all elements of `count` arrays.
void square_sum(const float* const* arrays, const int64_t* sizes, int64_t count, double* out) {
    std::vector<int64_t> starts(count + 1, 0);  // the first part of each array
    for (int64_t array = 0; array < count; array++) starts[array + 1] = starts[array] + parts_of(sizes[array], PART);
    std::vector<double> sums(starts[count]);
    in_parts(starts[count], [&](int64_t part) {
        const int64_t array = std::upper_bound(starts.begin(), starts.end(), part) - starts.begin() - 1;
        const float* x = arrays[array];
        const Range range = part_of(sizes[array], PART, part - starts[array]);
        for (int64_t start = range.begin; start < range.end; start += BLOCK) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < std::min(start + BLOCK, range.end); i++) sum += x[i] * x[i];
            sums[part] += sum;
        }
    });
    *out = 0.0;
    for (double sum : sums) *out += sum;
}

}  // extern "C"
