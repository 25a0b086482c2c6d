// The LAMB step on CPUs in fp32.  Arrays are dense.  ops/cpu_kernels.py compiles this file.

#include "common.h"

namespace {

constexpr int64_t BLOCK = 4096;  // elements whose squares are added in fp32; the blocks' sums are added in double

}  // namespace

extern "C" {

// One LAMB step of `count` parameters of one group (formulas: lamb.py).  `factor` multiplies the gradients.
// u is computed twice, which is cheaper than writing and reading it.  The second pass runs backwards through a thread's
// range, since the cache still holds the end of it.
void lamb_step(float* const* weights, const float* const* gradients, float* const* first, float* const* second,
               const int64_t* sizes, int64_t count, float factor, float rate, float beta1, float beta2,
               float correction1, float correction2, float eps, float decay) {
    const float scale1 = 1.0f / correction1, scale2 = 1.0f / correction2;
    std::vector<double> norms(2 * omp_get_max_threads());
#pragma omp parallel
    for (int64_t parameter = 0; parameter < count; parameter++) {
        float *w = weights[parameter], *m = first[parameter], *v = second[parameter];
        const float* g = gradients[parameter];
        const Range range = own_range(sizes[parameter]);
        const auto update = [=](int64_t i) { return m[i] * scale1 / (std::sqrt(v[i] * scale2) + eps) + decay * w[i]; };
        double weight_square = 0.0, update_square = 0.0;
        for (int64_t start = range.begin; start < range.end; start += BLOCK) {
            float ww = 0.0f, uu = 0.0f;
#pragma omp simd reduction(+ : ww, uu)
            for (int64_t i = start; i < std::min(start + BLOCK, range.end); i++) {
                const float clipped = g[i] * factor;
                m[i] = beta1 * m[i] + (1.0f - beta1) * clipped;
                v[i] = beta2 * v[i] + (1.0f - beta2) * clipped * clipped;
                const float u = update(i);
                ww += w[i] * w[i];
                uu += u * u;
            }
            weight_square += ww;
            update_square += uu;
        }
        norms[2 * omp_get_thread_num()] = weight_square;
        norms[2 * omp_get_thread_num() + 1] = update_square;
#pragma omp barrier
        weight_square = update_square = 0.0;
        for (int thread = 0; thread < omp_get_num_threads(); thread++) {
            weight_square += norms[2 * thread];
            update_square += norms[2 * thread + 1];
        }
        const bool usable = decay != 0.0f && weight_square > 0.0 && update_square > 0.0;
        const float scaled_rate = rate * (usable ? static_cast<float>(std::sqrt(weight_square / update_square)) : 1.0f);
        for (int64_t end = range.end; end > range.begin; end -= BLOCK) {
#pragma omp simd
            for (int64_t i = std::max(end - BLOCK, range.begin); i < end; i++) w[i] -= scaled_rate * update(i);
        }
#pragma omp barrier
    }
}

// The sum of the squares of all elements of `count` arrays.
void square_sum(const float* const* arrays, const int64_t* sizes, int64_t count, double* out) {
    std::vector<double> sums(omp_get_max_threads());
#pragma omp parallel
    {
        double total = 0.0;
        for (int64_t array = 0; array < count; array++) {
            const float* x = arrays[array];
            const Range range = own_range(sizes[array]);
            for (int64_t start = range.begin; start < range.end; start += BLOCK) {
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = start; i < std::min(start + BLOCK, range.end); i++) sum += x[i] * x[i];
                total += sum;
            }
        }
        sums[omp_get_thread_num()] = total;
    }
    *out = 0.0;
    for (double sum : sums) *out += sum;
}

}  // extern "C"
