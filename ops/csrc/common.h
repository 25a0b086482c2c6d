// Shared by the kernels for CPUs: exponential, normal distribution, dropout, ranges.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

// The normal distribution at x: density, and cumulative distribution to 1e-7 (Abramowitz & Stegun 7.1.26).
struct Normal {
    float density, cumulative;
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

// Dropout with probability p: the factor of element i, 0 or 1/(1−p), a hash of the seed and i.
class Dropout {
  public:
    Dropout(float p, uint64_t seed)
        : low(static_cast<uint32_t>(mixed(seed))), high(static_cast<uint32_t>(mixed(seed) >> 32)),
          threshold(static_cast<uint32_t>(p * 4294967296.0)), scale(1.0f / (1.0f - p)) {}

    float operator()(uint32_t i) const { return hash(i) < threshold ? 0.0f : scale; }

  private:
    // triple32 (Chris Wellons, hash-prospector), with half of the seed added before each of its first two rounds.
    uint32_t hash(uint32_t i) const {
        uint32_t x = i + low;
        x = (x ^ (x >> 17)) * 0xed5ad4bbU + high;
        x = (x ^ (x >> 11)) * 0xac4c1b51U;
        x = (x ^ (x >> 15)) * 0x31848babU;
        return x ^ (x >> 14);
    }

    // splitmix64 (Steele et al. 2014), so that consecutive seeds give unrelated masks.
    static uint64_t mixed(uint64_t seed) {
        seed = (seed + 0x9e3779b97f4a7c15U) * 0xbf58476d1ce4e5b9U;
        seed = (seed ^ (seed >> 27)) * 0x94d049bb133111ebU;
        return seed ^ (seed >> 31);
    }

    uint32_t low, high, threshold;
    float scale;
};

// The half-open range [begin, end).
struct Range {
    int64_t begin, end;
};

// The part of [0, count) that one of several threads works on.
inline Range range_of(int64_t count, int64_t threads, int64_t thread) {
    return {count * thread / threads, count * (thread + 1) / threads};
}
