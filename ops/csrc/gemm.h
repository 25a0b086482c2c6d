// Matrix multiplication in fp32 on CPUs, after Goto & van de Geijn 2008 (Anatomy of high-performance matrix
// multiplication).
//
// A tile of C is accumulated in registers over DEPTH values of k.  The panel of A that it reads stays in the L1 cache,
// the block of B in the L2 cache.  Both are packed, so transposed matrices are as fast as row-major ones.  An epilogue
// works on rows of C while the cache holds them.

#pragma once

#include <utility>

#include "parts.h"

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 14;  // 28 of 32 registers hold the tile
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, MAX_ROWS = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, MAX_ROWS = 12;  // 24 of 32
#else
constexpr int LANES = 4, MAX_ROWS = 6;
#endif
constexpr int WIDTH = 2 * LANES;            // columns of a tile
constexpr int64_t DEPTH = 256;              // values of k that a tile accumulates before it is written
constexpr int64_t COLUMNS = 1024;           // of a block of B, which takes 1 MB
constexpr int64_t MIN_UNIT = 28;            // rows that a thread takes at a time, as a rule
constexpr int64_t MAX_UNITS = 256;          // of a product
constexpr int64_t ROW_STRIDE = DEPTH + 16;  // of a row-major panel: a power of two would put rows in the same cache set
constexpr int COLUMN_STRIDE = (MAX_ROWS + LANES - 1) / LANES * LANES;  // of a column-major panel: whole vectors
constexpr int64_t PANEL = std::max<int64_t>(MAX_ROWS * ROW_STRIDE, COLUMN_STRIDE * DEPTH);

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Element (i, j) of a matrix is data[i·row + j·column].
struct Matrix {
    const float* data;
    int64_t row, column;

    const float& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }

    Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

struct alignas(64) CacheLine {
    float values[16];
};

// Memory of the calling thread, aligned to a cache line.  It is kept, and grows to the largest request.
template <int USE>
float* scratch(int64_t count) {
    static thread_local std::vector<CacheLine> memory;
    if (16 * memory.size() < static_cast<size_t>(count)) memory.resize((count + 15) / 16);
    return reinterpret_cast<float*>(memory.data());
}

// The tile c (ROWS, WIDTH) = panel of A · panel of B + bias (WIDTH, or null), or += panel of A · panel of B.
template <int ROWS, bool ROW_MAJOR>
void tile(const float* a, const float* b, int64_t depth, const float* bias, float* c, int64_t stride, bool add) {
    Vector sum[ROWS][2];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++) {
        sum[row][0] = sum[row][1] = Vector{};
        __builtin_prefetch(c + row * stride, 1);  // written after many cycles, in which it may come from far
        __builtin_prefetch(c + row * stride + WIDTH - 1, 1);
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++, b += WIDTH) {
        const Vector left = *(const Vector*)b, right = *(const Vector*)(b + LANES);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            const float x = ROW_MAJOR ? a[row * ROW_STRIDE + k] : a[k * COLUMN_STRIDE + row];
            sum[row][0] += x * left;
            sum[row][1] += x * right;
        }
    }
    const Vector left = bias ? *(const Vector*)bias : Vector{};
    const Vector right = bias ? *(const Vector*)(bias + LANES) : Vector{};
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++) {  // not in a loop over the halves, which would move the sums to memory
        Vector *const out = (Vector*)(c + row * stride), *const next = out + 1;
        *out = sum[row][0] + (add ? *out : left);
        *next = sum[row][1] + (add ? *next : right);
    }
}

typedef void Tile(const float*, const float*, int64_t, const float*, float*, int64_t, bool);

// The functions for tiles of 1, 2, … rows.
template <bool ROW_MAJOR, int... ROWS>
Tile* const* tiles(std::integer_sequence<int, ROWS...>) {
    static Tile* const all[] = {tile<ROWS + 1, ROW_MAJOR>...};
    return all;
}

// A tile of fewer columns than WIDTH.
inline void narrow_tile(Tile* tile, int64_t rows, int64_t columns, const float* a, const float* b, int64_t depth,
                        const float* bias, float* c, int64_t stride, bool add) {
    float whole[MAX_ROWS * WIDTH];
    tile(a, b, depth, nullptr, whole, WIDTH, false);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            c[i * stride + j] = whole[i * WIDTH + j] + (add ? c[i * stride + j] : bias ? bias[j] : 0.0f);
}

#ifdef __clang__
constexpr bool SHUFFLES = false;
inline void transpose(Vector*) {}
#else
constexpr bool SHUFFLES = true;
typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));

// Swap the lanes of a whose index has the bit STEP with the lanes of b whose index does not have it.
template <int STEP, int... LANE>
void exchange(Vector& a, Vector& b, std::integer_sequence<int, LANE...>) {
    const Vector first = __builtin_shuffle(a, b, Lanes{(LANE & STEP ? LANES + LANE - STEP : LANE)...});
    b = __builtin_shuffle(a, b, Lanes{(LANE & STEP ? LANES + LANE : LANE + STEP)...});
    a = first;
}

// Transpose LANES vectors, the rows of a square matrix, one bit of the indices after the other.
template <int STEP = LANES / 2>
void transpose(Vector* rows) {
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++)
        if (!(row & STEP)) exchange<STEP>(rows[row], rows[row + STEP], std::make_integer_sequence<int, LANES>());
    if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}
#endif

// Pack `columns` columns of B as consecutive panels of WIDTH columns.
inline void pack_b(Matrix b, int64_t depth, int64_t columns, float* out) {
    const auto packed = [=](int64_t k, int64_t j) { return out + j / WIDTH * WIDTH * depth + k * WIDTH + j % WIDTH; };
    int64_t whole = 0;
    if (b.column == 1) {
        whole = columns / WIDTH * WIDTH;
        for (int64_t k = 0; k < depth; k++)
            for (int64_t j = 0; j < whole; j += WIDTH) std::memcpy(packed(k, j), &b.at(k, j), WIDTH * sizeof(float));
    } else if (SHUFFLES && b.row == 1 && depth % LANES == 0) {
        whole = columns / LANES * LANES;
        for (int64_t j = 0; j < whole; j += LANES) {
            for (int64_t k = 0; k < depth; k += LANES) {
                Vector rows[LANES];
                for (int lane = 0; lane < LANES; lane++) rows[lane] = *(const Vector*)&b.at(k, j + lane);
                transpose(rows);
                for (int lane = 0; lane < LANES; lane++) *(Vector*)packed(k + lane, j) = rows[lane];
            }
        }
    }
    for (int64_t j = whole; j < columns; j++)
        for (int64_t k = 0; k < depth; k++) *packed(k, j) = b.at(k, j);
}

// Pack `rows` rows of A from `row` on as a panel: row-major where A is, with ROW_STRIDE, else column-major, with
// COLUMN_STRIDE.  Returns the panel's first element.
inline const float* pack_a(Matrix a, int64_t row, int64_t rows, int64_t M, int64_t depth, float* out) {
    if (a.column == 1) {
        const int64_t whole = depth / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES)  // all rows at once: the memory serves many requests in parallel
            for (int64_t i = 0; i < rows; i++)
                *(Vector*)(out + i * ROW_STRIDE + k) = *(const Vector*)(a.data + (row + i) * a.row + k);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = whole; k < depth; k++) out[i * ROW_STRIDE + k] = a.data[(row + i) * a.row + k];
        return out;
    }
    const int64_t before = std::max<int64_t>(0, row + COLUMN_STRIDE - M);  // so that whole vectors can be read
    if (a.row == 1 && before <= row) {
        const float* from = a.data + row - before;
        for (int64_t k = 0; k < depth; k++)
            for (int64_t i = 0; i < COLUMN_STRIDE; i += LANES)
                *(Vector*)(out + k * COLUMN_STRIDE + i) = *(const Vector*)(from + k * a.column + i);
        return out + before;
    }
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < rows; i++) out[k * COLUMN_STRIDE + i] = a.data[(row + i) * a.row + k * a.column];
    return out;
}

// c (M, N) = a (M, K) · b (K, N) + bias (N, or null), or += a · b.  `stride`: of the rows of c.
struct Gemm {
    Matrix a, b;
    const float* bias;
    float* c;
    int64_t stride, M, N, K;
    bool add;
    int64_t first_column = 0;  // of a wider product's c, of which this is a part

    // A product is computed in stages, one for each block of B: all values of k for the first columns, and so on.
    int64_t depths() const { return parts_of(K, DEPTH); }
    int64_t stages() const { return parts_of(N, COLUMNS) * depths(); }

    // Panels of A, and the units of some of them that a thread takes at a time.
    int64_t panels() const { return parts_of(M, MAX_ROWS); }
    int64_t unit_panels() const { return std::max(parts_of(MIN_UNIT, MAX_ROWS), parts_of(panels(), MAX_UNITS)); }
    int64_t units() const { return parts_of(panels(), unit_panels()); }

    Gemm of_columns(Range range) const {
        return {a, b.from(0, range.begin), bias ? bias + range.begin : nullptr, c + range.begin, stride, M,
                range.end - range.begin, K, add, first_column + range.begin};
    }

    int64_t block_size() const { return parts_of(std::min(N, COLUMNS), WIDTH) * WIDTH * std::min(K, DEPTH); }
};

// One block of B: which columns, which values of k.
struct Stage {
    int64_t column, columns, k, depth;

    Stage(const Gemm& g, int64_t number)
        : column(number / g.depths() * COLUMNS), columns(std::min(COLUMNS, g.N - column)),
          k(number % g.depths() * DEPTH), depth(std::min(DEPTH, g.K - k)) {}
};

// Pack the stage's block of B.
inline void pack(const Gemm& g, const Stage& stage, float* block) {
    pack_b(g.b.from(stage.k, stage.column), stage.depth, stage.columns, block);
}

// Multiply the rows of a unit by the block of B.  epilogue(unit, row, rows, column, columns) is called once for each
// part of c that is complete.
template <class Epilogue>
void compute_unit(const Gemm& g, const Stage& stage, int64_t unit, const float* block, const Epilogue& epilogue) {
    const auto sizes = std::make_integer_sequence<int, MAX_ROWS>();
    Tile* const* tile_of = g.a.column == 1 ? tiles<true>(sizes) : tiles<false>(sizes);
    const bool add = g.add || stage.k;
    const Range own = part_of(g.panels(), g.unit_panels(), unit);
    alignas(64) float panel[PANEL];
    for (int64_t p = own.begin; p < own.end; p++) {
        const Range range = range_of(g.M, g.panels(), p);
        const int64_t row = range.begin, rows = range.end - range.begin;
        Tile* const tile = tile_of[rows - 1];
        const float* packed_a = pack_a(g.a.from(0, stage.k), row, rows, g.M, stage.depth, panel);
        for (int64_t j = 0; j < stage.columns; j += WIDTH) {
            float* out = g.c + row * g.stride + stage.column + j;
            const float *packed_b = block + j * stage.depth, *start = g.bias ? g.bias + stage.column + j : nullptr;
            if (stage.columns - j >= WIDTH)
                tile(packed_a, packed_b, stage.depth, start, out, g.stride, add);
            else
                narrow_tile(tile, rows, stage.columns - j, packed_a, packed_b, stage.depth, start, out, g.stride, add);
        }
        if (stage.k + stage.depth == g.K) epilogue(unit, row, rows, g.first_column + stage.column, stage.columns);
    }
}

inline void no_epilogue(int64_t, int64_t, int64_t, int64_t, int64_t) {}

// The product by the calling thread alone.
inline void gemm_alone(const Gemm& g) {
    float* block = scratch<0>(g.block_size());
    for (int64_t number = 0; number < g.stages(); number++) {
        const Stage stage(g, number);
        pack(g, stage, block);
        for (int64_t unit = 0; unit < g.units(); unit++) compute_unit(g, stage, unit, block, no_epilogue);
    }
}
