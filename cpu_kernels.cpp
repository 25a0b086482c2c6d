// What a BERT training step does between its matrix products, and the LAMB step, on CPUs: fp32, one pass over memory.
//
// cpu_kernels.py compiles this file when a run starts and calls it.  Arrays are dense and row-major.  Every sum is taken
// in an order that depends on the number of threads alone, so a run repeats itself bit by bit.
//
// Dropout keeps no mask: whether element i is dropped is a function of a seed and of i, asked again on the way back.
//
// Legend: B rows in the batch, S tokens in a row, N heads, H head size, D = N·H hidden size, V vocabulary.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4096;  // elements whose squares are added in fp32 before they join a double

// eˣ to 2 units in the last place, by 2ⁿ·eʳ with |r| ≤ ln 2 / 2 (the coefficients are those of the Cephes library).
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power;
}

// The normal distribution at x: density, and distribution function to 1e-7 (Abramowitz & Stegun 7.1.26).
struct Normal {
    float density, distribution;
};

inline Normal normal(float x) {
    float e = exponential(-0.5f * x * x);
    float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * e;
    return {0.39894228f * e, x < 0.0f ? tail : 1.0f - tail};
}

// Dropout with probability p: the factor of element i, 0 or 1/(1−p).
class Dropout {
  public:
    Dropout(float p, uint64_t seed)
        : low(static_cast<uint32_t>(mixed(seed))), high(static_cast<uint32_t>(mixed(seed) >> 32)),
          threshold(static_cast<uint32_t>(p * 4294967296.0)), scale(1.0f / (1.0f - p)) {}

    float operator()(uint32_t i) const { return hash(i) < threshold ? 0.0f : scale; }

  private:
    // Wellons' triple32, with half of the seed added before each of its first two rounds.
    uint32_t hash(uint32_t i) const {
        uint32_t x = i + low;
        x = (x ^ (x >> 17)) * 0xed5ad4bbU + high;
        x = (x ^ (x >> 11)) * 0xac4c1b51U;
        x = (x ^ (x >> 15)) * 0x31848babU;
        return x ^ (x >> 14);
    }

    // Steele's splitmix64, so that neighbouring seeds are as unlike as any.
    static uint64_t mixed(uint64_t seed) {
        seed = (seed + 0x9e3779b97f4a7c15U) * 0xbf58476d1ce4e5b9U;
        seed = (seed ^ (seed >> 27)) * 0x94d049bb133111ebU;
        return seed ^ (seed >> 31);
    }

    uint32_t low, high, threshold;
    float scale;
};

// The rows from begin to end belong to this thread, always the same ones.
struct Share {
    int64_t begin, end;
    explicit Share(int64_t rows) {
        int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        begin = rows * thread / threads;
        end = rows * (thread + 1) / threads;
    }
};

// Sums over all rows, which each thread gathers for its own rows.
class ColumnSums {
  public:
    explicit ColumnSums(int64_t width) : width(width), sums(omp_get_max_threads() * width, 0.0f) {}

    float* own() { return sums.data() + omp_get_thread_num() * width; }

    void write(float* out, int64_t first, int64_t count) const {
        std::fill(out, out + count, 0.0f);
        for (size_t start = first; start < sums.size(); start += width)
            for (int64_t i = 0; i < count; i++) out[i] += sums[start + i];
    }

  private:
    int64_t width;
    std::vector<float> sums;
};

}  // namespace

extern "C" {

// products (3, B, S, D) + bias (3, D) → heads (3, B, N, S, H)
void split_heads(const float* products, const float* bias, float* heads, int64_t B, int64_t S, int64_t N, int64_t H) {
#pragma omp parallel for
    for (int64_t row = 0; row < 3 * B * N; row++) {
        int64_t n = row % N, which_row = row / N;
        const float* offset = bias + (which_row / B * N + n) * H;
        for (int64_t s = 0; s < S; s++) {
            const float* in = products + ((which_row * S + s) * N + n) * H;
            float* out = heads + (row * S + s) * H;
            for (int64_t h = 0; h < H; h++) out[h] = in[h] + offset[h];
        }
    }
}

// gradients of heads (3, B, N, S, H) → those of products (3, B, S, D) and of bias (3, D)
void split_heads_backward(const float* heads, float* products, float* bias, int64_t B, int64_t S, int64_t N,
                          int64_t H) {
#pragma omp parallel for
    for (int64_t place = 0; place < 3 * N; place++) {
        int64_t which = place / N, n = place % N;
        float* total = bias + place * H;
        std::fill(total, total + H, 0.0f);
        for (int64_t b = 0; b < B; b++) {
            for (int64_t s = 0; s < S; s++) {
                const float* in = heads + (((which * B + b) * N + n) * S + s) * H;
                float* out = products + (((which * B + b) * S + s) * N + n) * H;
                for (int64_t h = 0; h < H; h++) {
                    out[h] = in[h];
                    total[h] += in[h];
                }
            }
        }
    }
}

// scores (B, N, S, S) → softmax(scores·scale) within each sequence, in place, and dropout of it in `dropped`.
// sequence (B, S) holds the number of each token's sequence.
void attention_weights(float* scores, float* dropped, const int32_t* sequence, int64_t B, int64_t N, int64_t S,
                       float scale, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
#pragma omp parallel for
    for (int64_t row = 0; row < B * N * S; row++) {
        const int32_t* others = sequence + row / (N * S) * S;
        const int32_t own = others[row % S];
        float* x = scores + row * S;
        float highest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < S; i++) {
            x[i] = others[i] == own ? x[i] * scale : -INFINITY;
            highest = std::max(highest, x[i]);
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < S; i++) {
            x[i] = others[i] == own ? exponential(x[i] - highest) : 0.0f;
            sum += x[i];
        }
        const float inverse = 1.0f / sum;
        const uint32_t first = static_cast<uint32_t>(row * S);
        float* y = dropped + row * S;
        if (p == 0.0f) {
            for (int64_t i = 0; i < S; i++) y[i] = x[i] *= inverse;
            continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < S; i++) {
            x[i] *= inverse;
            y[i] = x[i] * dropout(first + static_cast<uint32_t>(i));
        }
    }
}

// gradient of `dropped` → gradient of the scores, in place
void attention_weights_backward(float* gradient, const float* weights, const float* dropped, int64_t rows, int64_t S,
                                float scale) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        float* g = gradient + row * S;
        const float *x = weights + row * S, *y = dropped + row * S;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < S; i++) sum += g[i] * y[i];
#pragma omp simd
        for (int64_t i = 0; i < S; i++) g[i] = scale * (g[i] * y[i] - x[i] * sum);
    }
}

// product (T, D) → total = residual + dropout(product + bias), in place; out = LayerNorm(total).
// statistics (T, 2): mean and 1/deviation of each row of the total.
void residual_norm(float* product, const float* bias, const float* residual, const float* weight, const float* shift,
                   float* out, float* statistics, int64_t T, int64_t D, float eps, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
#pragma omp parallel for
    for (int64_t row = 0; row < T; row++) {
        float *x = product + row * D, *y = out + row * D;
        const float* r = residual + row * D;
        const uint32_t first = static_cast<uint32_t>(row * D);
        float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < D; i++) {
            x[i] = r[i] + (x[i] + bias[i]) * dropout(first + static_cast<uint32_t>(i));
            sum += x[i];
        }
        const float mean = sum / D;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < D; i++) square += (x[i] - mean) * (x[i] - mean);
        const float inverse = 1.0f / std::sqrt(square / D + eps);
#pragma omp simd
        for (int64_t i = 0; i < D; i++) y[i] = (x[i] - mean) * inverse * weight[i] + shift[i];
        statistics[2 * row] = mean;
        statistics[2 * row + 1] = inverse;
    }
}

// gradient of out → gradients of residual and product (T, D), and of weight, shift and bias in sums (3, D)
void residual_norm_backward(const float* gradient, const float* total, const float* statistics, const float* weight,
                            float* residual, float* product, float* sums, int64_t T, int64_t D, float p,
                            uint64_t seed) {
    const Dropout dropout(p, seed);
    ColumnSums columns(3 * D);
#pragma omp parallel
    {
        float *weights = columns.own(), *shifts = weights + D, *biases = shifts + D;
        const Share share(T);
        for (int64_t row = share.begin; row < share.end; row++) {
            const float *g = gradient + row * D, *x = total + row * D;
            float *r = residual + row * D, *y = product + row * D;
            const float mean = statistics[2 * row], inverse = statistics[2 * row + 1];
            const uint32_t first = static_cast<uint32_t>(row * D);
            float sum = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : sum, along)
            for (int64_t i = 0; i < D; i++) {
                const float normed = (x[i] - mean) * inverse, inner = g[i] * weight[i];
                sum += inner;
                along += inner * normed;
                weights[i] += g[i] * normed;
                shifts[i] += g[i];
            }
            sum /= D;
            along /= D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) {
                const float normed = (x[i] - mean) * inverse;
                r[i] = (g[i] * weight[i] - sum - normed * along) * inverse;
                y[i] = r[i] * dropout(first + static_cast<uint32_t>(i));
                biases[i] += y[i];
            }
        }
    }
    columns.write(sums, 0, 3 * D);
}

// product (T, F) + bias in place; out = GELU of it
void bias_gelu(float* product, const float* bias, float* out, int64_t T, int64_t F) {
#pragma omp parallel for
    for (int64_t row = 0; row < T; row++) {
        float *x = product + row * F, *y = out + row * F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            x[i] += bias[i];
            y[i] = x[i] * normal(x[i]).distribution;
        }
    }
}

// gradient of out (T, F) → gradient of the product, in place, and of the bias
void bias_gelu_backward(float* gradient, const float* inner, float* bias, int64_t T, int64_t F) {
    ColumnSums columns(F);
#pragma omp parallel
    {
        float* biases = columns.own();
        const Share share(T);
        for (int64_t row = share.begin; row < share.end; row++) {
            float* g = gradient + row * F;
            const float* x = inner + row * F;
#pragma omp simd
            for (int64_t i = 0; i < F; i++) {
                const Normal at = normal(x[i]);
                g[i] *= at.distribution + x[i] * at.density;
                biases[i] += g[i];
            }
        }
    }
    columns.write(bias, 0, F);
}

// product (T, V) + bias (V) are scores.  losses (T): cross entropy of each row against its label, times `share`; 0 where
// the label is below 0.  The product becomes the gradient of the sum of the losses, and bias_gradient that of the bias.
void cross_entropy(float* product, const float* bias, const int64_t* labels, float* losses, float* bias_gradient,
                   int64_t T, int64_t V, float share_of_row) {
    ColumnSums columns(V);
#pragma omp parallel
    {
        float* biases = columns.own();
        const Share share(T);
        for (int64_t row = share.begin; row < share.end; row++) {
            float* x = product + row * V;
            losses[row] = 0.0f;
            if (labels[row] < 0) {
                std::fill(x, x + V, 0.0f);
                continue;
            }
            float highest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : highest)
            for (int64_t i = 0; i < V; i++) {
                x[i] += bias[i];
                highest = std::max(highest, x[i]);
            }
            const float score = x[labels[row]];
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < V; i++) {
                x[i] = exponential(x[i] - highest);
                sum += x[i];
            }
            losses[row] = (highest + std::log(sum) - score) * share_of_row;
            const float factor = share_of_row / sum;
#pragma omp simd
            for (int64_t i = 0; i < V; i++) {
                x[i] *= factor;
                biases[i] += x[i];
            }
            x[labels[row]] -= share_of_row;
            biases[labels[row]] -= share_of_row;
        }
    }
    columns.write(bias_gradient, 0, V);
}

// One LAMB step of `count` parameters of one group (the formulas stand in lamb.py).  `factor` multiplies the gradients.
// u is computed twice, which is cheaper than to write and read it; the second time from the end of a thread's share
// backwards, where the cache still holds what the first time left there.
void lamb_step(float* const* weights, const float* const* gradients, float* const* first, float* const* second,
               const int64_t* sizes, int64_t count, float factor, float rate, float beta1, float beta2,
               float correction1, float correction2, float eps, float decay) {
    const float scale1 = 1.0f / correction1, scale2 = 1.0f / correction2;
    std::vector<double> norms(2 * omp_get_max_threads());
#pragma omp parallel
    for (int64_t parameter = 0; parameter < count; parameter++) {
        float *w = weights[parameter], *m = first[parameter], *v = second[parameter];
        const float* g = gradients[parameter];
        const Share share(sizes[parameter]);
        const auto update = [=](int64_t i) { return m[i] * scale1 / (std::sqrt(v[i] * scale2) + eps) + decay * w[i]; };
        double weight_square = 0.0, update_square = 0.0;
        for (int64_t start = share.begin; start < share.end; start += BLOCK) {
            float ww = 0.0f, uu = 0.0f;
#pragma omp simd reduction(+ : ww, uu)
            for (int64_t i = start; i < std::min(start + BLOCK, share.end); i++) {
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
        const float pace = rate * (usable ? static_cast<float>(std::sqrt(weight_square / update_square)) : 1.0f);
        for (int64_t end = share.end; end > share.begin; end -= BLOCK) {
#pragma omp simd
            for (int64_t i = std::max(end - BLOCK, share.begin); i < end; i++) w[i] -= pace * update(i);
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
            const Share share(sizes[array]);
            for (int64_t start = share.begin; start < share.end; start += BLOCK) {
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = start; i < std::min(start + BLOCK, share.end); i++) sum += x[i] * x[i];
                total += sum;
            }
        }
        sums[omp_get_thread_num()] = total;
    }
    *out = 0.0;
    for (double sum : sums) *out += sum;
}

}  // extern "C"
