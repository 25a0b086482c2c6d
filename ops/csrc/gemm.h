// Matrix products in fp32 on CPUs, after Goto & van de Geijn 2008 (Anatomy of high-performance matrix multiplication).
//
// A tile of the result stays in registers while it runs down DEPTH products; the panel of A that it reads stays in the
// first cache, the block of B in the second.  Both are copied for that, which also makes transposed matrices as fast as
// straight ones.  Whoever asks for a product may go on with its rows while the cache holds them.

#pragma once

#include <utility>

#include "common.h"

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST_ROWS = 14;  // 28 of 32 registers hold the tile
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, MOST_ROWS = 6;  // 12 of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, MOST_ROWS = 12;  // 24 of 32
#else
constexpr int LANES = 4, MOST_ROWS = 6;
#endif
constexpr int WIDTH = 2 * LANES;            // columns of a tile
constexpr int64_t DEPTH = 256;              // products that a tile adds up before it goes back to memory
constexpr int64_t COLUMNS = 1024;           // of a block of B, which takes 1 MB then
constexpr int64_t PANEL_STEP = DEPTH + 16;  // of the rows of a straight panel: not a power of two, for the cache's sake
constexpr int CROSS = (MOST_ROWS + LANES - 1) / LANES * LANES;  // of the columns of a transposed one: whole vectors
constexpr int64_t PANEL = std::max<int64_t>(MOST_ROWS * PANEL_STEP, CROSS * DEPTH);

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Element (i, j) of a matrix lies at data[i·row + j·column].
struct Matrix {
    const float* data;
    int64_t row, column;

    const float& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }

    Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

// Those who compute a product together: all threads of a parallel region, or one alone.  The block is theirs.
struct Team {
    int64_t size, member;
    float* block;

    Share share(int64_t count) const { return share_of(count, size, member); }

    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

struct alignas(64) Line {
    float values[16];
};

// Memory of the calling thread that begins with a line of the cache: always the same, as large as ever asked for.
template <int USE>
float* scratch(int64_t count) {
    static thread_local std::vector<Line> memory;
    if (16 * memory.size() < static_cast<size_t>(count)) memory.resize((count + 15) / 16);
    return reinterpret_cast<float*>(memory.data());
}

// For a block of so many columns and rows of B.
inline float* block_memory(int64_t columns, int64_t depth) {
    columns = (std::min(columns, COLUMNS) + WIDTH - 1) / WIDTH * WIDTH;
    return scratch<0>(columns * std::min(depth, DEPTH));
}

// The tile c (ROWS, WIDTH) = or += panel of A · panel of B, and bias (WIDTH), where there is one.
template <int ROWS, bool STRAIGHT>
void tile(const float* a, const float* b, int64_t depth, const float* bias, float* c, int64_t step, bool add) {
    Vector sum[ROWS][2] = {};
    for (int64_t k = 0; k < depth; k++, b += WIDTH) {
        const Vector left = *(const Vector*)b, right = *(const Vector*)(b + LANES);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            const float x = STRAIGHT ? a[row * PANEL_STEP + k] : a[k * CROSS + row];
            sum[row][0] += x * left;
            sum[row][1] += x * right;
        }
    }
    for (int half = 0; half < 2; half++) {
        const Vector start = bias ? *(const Vector*)(bias + half * LANES) : Vector{};
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            Vector* out = (Vector*)(c + row * step + half * LANES);
            *out = sum[row][half] + (add ? *out : start);
        }
    }
}

typedef void Tile(const float*, const float*, int64_t, const float*, float*, int64_t, bool);

// The tiles of 1, 2, … rows.
template <bool STRAIGHT, int... ROWS>
Tile* const* tiles(std::integer_sequence<int, ROWS...>) {
    static Tile* const all[] = {tile<ROWS + 1, STRAIGHT>...};
    return all;
}

// A tile of fewer columns than WIDTH.
inline void narrow_tile(Tile* run, int64_t rows, int64_t columns, const float* a, const float* b, int64_t depth,
                        const float* bias, float* c, int64_t step, bool add) {
    float whole[MOST_ROWS * WIDTH];
    run(a, b, depth, nullptr, whole, WIDTH, false);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            c[i * step + j] = whole[i * WIDTH + j] + (add ? c[i * step + j] : bias ? bias[j] : 0.0f);
}

#ifdef __clang__
constexpr bool SHUFFLES = false;
inline void transpose(Vector*) {}
#else
constexpr bool SHUFFLES = true;
typedef int32_t Places __attribute__((vector_size(4 * LANES)));

// Swap the half of a whose lanes have the bit STEP with the half of b whose lanes have it not.
template <int STEP, int... LANE>
void exchange(Vector& a, Vector& b, std::integer_sequence<int, LANE...>) {
    const Vector first = __builtin_shuffle(a, b, Places{(LANE & STEP ? LANES + LANE - STEP : LANE)...});
    b = __builtin_shuffle(a, b, Places{(LANE & STEP ? LANES + LANE : LANE + STEP)...});
    a = first;
}

// LANES vectors as the rows of a square matrix: transposed, one bit of the places after the other.
template <int STEP = LANES / 2>
void transpose(Vector* rows) {
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++)
        if (!(row & STEP)) exchange<STEP>(rows[row], rows[row + STEP], std::make_integer_sequence<int, LANES>());
    if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}
#endif

// `columns` columns of B as panels of WIDTH columns, one behind the other.
inline void copy_columns(Matrix b, int64_t depth, int64_t columns, float* out) {
    const auto place = [=](int64_t k, int64_t j) { return out + j / WIDTH * WIDTH * depth + k * WIDTH + j % WIDTH; };
    int64_t whole = 0;
    if (b.column == 1) {
        whole = columns / WIDTH * WIDTH;
        for (int64_t k = 0; k < depth; k++)
            for (int64_t j = 0; j < whole; j += WIDTH) std::memcpy(place(k, j), &b.at(k, j), WIDTH * sizeof(float));
    } else if (SHUFFLES && b.row == 1 && depth % LANES == 0) {
        whole = columns / LANES * LANES;
        for (int64_t j = 0; j < whole; j += LANES) {
            for (int64_t k = 0; k < depth; k += LANES) {
                Vector rows[LANES];
                for (int lane = 0; lane < LANES; lane++) rows[lane] = *(const Vector*)&b.at(k, j + lane);
                transpose(rows);
                for (int lane = 0; lane < LANES; lane++) *(Vector*)place(k + lane, j) = rows[lane];
            }
        }
    }
    for (int64_t j = whole; j < columns; j++)
        for (int64_t k = 0; k < depth; k++) *place(k, j) = b.at(k, j);
}

// `rows` rows of A from `row` on as a panel: rows of PANEL_STEP where A is straight, else columns of CROSS.
// Gives where the panel begins.
inline const float* copy_rows(Matrix a, int64_t row, int64_t rows, int64_t M, int64_t depth, float* out) {
    if (a.column == 1) {
        const int64_t whole = depth / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES)  // all rows at once: memory answers many requests at a time
            for (int64_t i = 0; i < rows; i++)
                *(Vector*)(out + i * PANEL_STEP + k) = *(const Vector*)(a.data + (row + i) * a.row + k);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = whole; k < depth; k++) out[i * PANEL_STEP + k] = a.data[(row + i) * a.row + k];
        return out;
    }
    const int64_t before = std::max<int64_t>(0, row + CROSS - M);  // so that whole vectors can be read
    if (a.row == 1 && before <= row) {
        const float* from = a.data + row - before;
        for (int64_t k = 0; k < depth; k++)
            for (int64_t i = 0; i < CROSS; i += LANES)
                *(Vector*)(out + k * CROSS + i) = *(const Vector*)(from + k * a.column + i);
        return out + before;
    }
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < rows; i++) out[k * CROSS + i] = a.data[(row + i) * a.row + k * a.column];
    return out;
}

// c (M, N), whose rows are `step` apart, = a (M, K) · b (K, N) + bias (N, or null), or += a · b.
// After the last product of a thread's rows from `row` on and the columns from `column` on, it calls
// finish(row, rows, column, columns): these are complete then, as are all columns before them.
template <class Finish>
void multiply(const Team& team, Matrix a, Matrix b, const float* bias, float* c, int64_t step, int64_t M, int64_t N,
              int64_t K, bool add, Finish finish) {
    const auto sizes = std::make_integer_sequence<int, MOST_ROWS>();
    Tile* const* tile_of = a.column == 1 ? tiles<true>(sizes) : tiles<false>(sizes);
    const Share own = team.share(M);
    const int64_t panels = (own.end - own.begin + MOST_ROWS - 1) / MOST_ROWS;
    alignas(64) float panel[PANEL];
    for (int64_t column = 0; column < N; column += COLUMNS) {
        const int64_t columns = std::min(COLUMNS, N - column);
        for (int64_t k = 0; k < K; k += DEPTH) {
            const int64_t depth = std::min(DEPTH, K - k);
            const Share copied = team.share((columns + WIDTH - 1) / WIDTH);
            copy_columns(b.from(k, column + copied.begin * WIDTH), depth,
                         std::min(copied.end * WIDTH, columns) - copied.begin * WIDTH,
                         team.block + copied.begin * WIDTH * depth);
            team.wait();
            for (int64_t p = 0; p < panels; p++) {
                const int64_t row = own.begin + (own.end - own.begin) * p / panels;
                const int64_t rows = own.begin + (own.end - own.begin) * (p + 1) / panels - row;
                Tile* const run = tile_of[rows - 1];
                const float* copied_rows = copy_rows(a.from(0, k), row, rows, M, depth, panel);
                for (int64_t j = 0; j < columns; j += WIDTH) {
                    float* out = c + row * step + column + j;
                    const float *from = team.block + j * depth, *start = bias ? bias + column + j : nullptr;
                    if (columns - j >= WIDTH)
                        run(copied_rows, from, depth, start, out, step, add || k);
                    else
                        narrow_tile(run, rows, columns - j, copied_rows, from, depth, start, out, step, add || k);
                }
                if (k + DEPTH >= K) finish(row, rows, column, columns);
            }
            team.wait();  // before another block takes this one's place
        }
    }
}

inline void nothing(int64_t, int64_t, int64_t, int64_t) {}

// The same by all threads: outside of a parallel region.
template <class Finish>
void multiply_together(Matrix a, Matrix b, const float* bias, float* c, int64_t step, int64_t M, int64_t N, int64_t K,
                       bool add, Finish finish) {
    float* block = block_memory(N, K);
#pragma omp parallel
    multiply({omp_get_num_threads(), omp_get_thread_num(), block}, a, b, bias, c, step, M, N, K, add, finish);
}

// The same where K is long, M and N are short: every thread copies what it needs by itself.
inline void multiply_apart(Matrix a, Matrix b, const float* bias, float* c, int64_t step, int64_t M, int64_t N,
                           int64_t K, bool add) {
#pragma omp parallel
    {
        Share rows{0, M}, columns{0, N};
        if (M >= N) rows = own_share(M);
        else {
            columns = own_share((N + WIDTH - 1) / WIDTH);
            columns = {columns.begin * WIDTH, std::min(columns.end * WIDTH, N)};
        }
        multiply({1, 0, block_memory(columns.end - columns.begin, K)}, a.from(rows.begin, 0), b.from(0, columns.begin),
                 bias ? bias + columns.begin : nullptr, c + rows.begin * step + columns.begin, step,
                 rows.end - rows.begin, columns.end - columns.begin, K, add, nothing);
    }
}
