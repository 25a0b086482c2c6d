// What a layer of BERT is made of, and the masked-LM loss, on CPUs: fp32, training forward and backward.
//
// cpu_kernels.py compiles this file when a run starts and calls it.  Arrays are dense and row-major.
// Dropout keeps no mask: whether element i is dropped is a function of a seed and of i, asked again on the way back.
//
// Legend: B rows in the batch, S tokens in a row, T = B·S, N heads, H head size, D = N·H hidden size, V vocabulary.

#include "gemm.h"

namespace {

constexpr int64_t ROWS_APART = 96;  // of a thread, or columns: fewer do not pay for copies of its own
constexpr int64_t QUERIES = 128;  // whose scores of 512 tokens stay in the second cache

Matrix rows_of(const float* data, int64_t step) { return {data, step, 1}; }

Matrix transposed(Matrix matrix) { return {matrix.data, matrix.column, matrix.row}; }

// A head of a row of the batch, in arrays (T, 3·D) of query, key and value and (T, D) of the context.
struct Head {
    Matrix query, key, value;
    const int32_t* numbers;  // of its tokens' sequences
    int64_t place, context;  // of its first number in the arrays
};

Head head_of(const float* qkv, const int32_t* sequence, int64_t head, int64_t N, int64_t S, int64_t H) {
    const int64_t D = N * H, token = head / N * S, column = head % N * H;
    const Matrix query = rows_of(qkv + token * 3 * D + column, 3 * D);
    return {query, query.from(0, D), query.from(0, 2 * D), sequence + token, token * 3 * D + column,
            token * D + column};
}

// Queries from `begin` on, and the `others` tokens from `seen` on that they may look at, where each sequence lies in
// one piece, up to whole tiles.  `first` is the place of their first weight in (B, N, S, S).
struct Block {
    int64_t begin, count, seen, others, first;
};

Block block_of(const int32_t* numbers, int64_t head, int64_t S, int64_t begin) {
    const int64_t count = std::min(QUERIES, S - begin), last = begin + count - 1;
    int64_t seen = begin, end = last + 1;
    while (seen > 0 && numbers[seen - 1] == numbers[begin]) seen--;
    while (end < S && numbers[end] == numbers[last]) end++;
    seen = seen / WIDTH * WIDTH;
    end = std::min(S, (end + WIDTH - 1) / WIDTH * WIDTH);
    return {begin, count, seen, end - seen, (head * S + begin) * S + seen};
}

// scores x (count) of a token of sequence `own` → softmax(x·scale) over the tokens of that sequence, in place
void softmax_within(float* x, const int32_t* sequence, int32_t own, int64_t count, float scale) {
    float highest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < count; i++) {
        x[i] = sequence[i] == own ? x[i] * scale : -INFINITY;
        highest = std::max(highest, x[i]);
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        x[i] = sequence[i] == own ? exponential(x[i] - highest) : 0.0f;
        sum += x[i];
    }
    const float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) x[i] *= inverse;
}

// y (count) = x after dropout, whose elements count from `first`
void drop(const float* x, float* y, int64_t count, Dropout dropout, uint32_t first) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * dropout(first + static_cast<uint32_t>(i));
}

// gradient g (count) of the weights x after dropout, y → that of the scores, in place
void softmax_backward(float* g, const float* x, const float* y, int64_t count, float scale) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += g[i] * y[i];
#pragma omp simd
    for (int64_t i = 0; i < count; i++) g[i] = scale * (g[i] * y[i] - x[i] * sum);
}

// y (D) = LayerNorm(x); statistics: mean and 1/deviation of x
void norm(const float* x, const float* weight, const float* shift, float* y, float* statistics, int64_t D, float eps) {
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; i++) sum += x[i];
    const float mean = sum / D;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < D; i++) square += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(square / D + eps);
#pragma omp simd
    for (int64_t i = 0; i < D; i++) y[i] = (x[i] - mean) * inverse * weight[i] + shift[i];
    statistics[0] = mean;
    statistics[1] = inverse;
}

// gradient g (D) of LayerNorm(x) → that of x; those of weight and shift are added to weights and shifts
void norm_backward(const float* g, const float* x, const float* statistics, const float* weight, float* out,
                   float* weights, float* shifts, int64_t D) {
    const float mean = statistics[0], inverse = statistics[1];
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
        out[i] = (g[i] * weight[i] - sum - normed * along) * inverse;
    }
}

}  // namespace

extern "C" {

extern const int64_t lanes = LANES;  // numbers in a vector

// c (M, N) = a (M, K) · b (K, N) + bias (N, or null), or += a · b.  The distances of rows and of columns are given, so
// that transposed matrices go in as they lie.
void gemm(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t b_column,
          const float* bias, float* c, int64_t M, int64_t N, int64_t K, int64_t add) {
    const Matrix left{a, a_row, a_column}, right{b, b_row, b_column};
    if (a_column != 1 && std::max(M, N) >= omp_get_max_threads() * ROWS_APART)
        multiply_apart(left, right, bias, c, N, M, N, K, add);
    else
        multiply_together(left, right, bias, c, N, M, N, K, add, nothing);
}

// inner (T, F) = x (T, D) · weightᵀ + bias; out = GELU of it.  weight (F, D).
void dense_gelu(const float* x, const float* weight, const float* bias, float* inner, float* out, int64_t T, int64_t F,
                int64_t D) {
    const auto gelu = [=](int64_t row, int64_t rows, int64_t column, int64_t columns) {
        for (int64_t at = row * F + column; at < (row + rows) * F; at += F)
#pragma omp simd
            for (int64_t i = at; i < at + columns; i++) out[i] = inner[i] * normal(inner[i]).distribution;
    };
    multiply_together({x, D, 1}, {weight, 1, D}, bias, inner, F, T, F, D, false, gelu);
}

// gradient (T, D) of x · weightᵀ, where x = GELU(inner) (T, F) → that of inner, and of the bias (F) that inner holds.
// weight (D, F).
void gelu_backward(const float* gradient, const float* weight, const float* inner, float* inner_gradient,
                   float* bias_gradient, int64_t T, int64_t F, int64_t D) {
    ColumnSums sums(F);
    const auto derive = [=, &sums](int64_t row, int64_t rows, int64_t column, int64_t columns) {
        float* biases = sums.own() + column;
        for (; rows > 0; row++, rows--) {
            float* g = inner_gradient + row * F + column;
            const float* x = inner + row * F + column;
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) {
                const Normal at = normal(x[i]);
                g[i] *= at.distribution + x[i] * at.density;
                biases[i] += g[i];
            }
        }
    };
    multiply_together({gradient, D, 1}, {weight, F, 1}, nullptr, inner_gradient, F, T, F, D, false, derive);
    sums.write(bias_gradient, 0, F);
}

// total (T, D) = residual + dropout(x (T, K) · weightᵀ + bias); out = LayerNorm(total).  weight (D, K).
// statistics (T, 2): mean and 1/deviation of each row of the total.
void dense_residual_norm(const float* x, const float* weight, const float* bias, const float* residual,
                         const float* norm_weight, const float* norm_shift, float* total, float* out, float* statistics,
                         int64_t T, int64_t D, int64_t K, float eps, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    const auto add_and_norm = [=](int64_t row, int64_t rows, int64_t column, int64_t columns) {
        if (column + columns < D) return;
        for (; rows > 0; row++, rows--) {
            float* x = total + row * D;
            const float* r = residual + row * D;
            const uint32_t first = static_cast<uint32_t>(row * D);
#pragma omp simd
            for (int64_t i = 0; i < D; i++) x[i] = r[i] + x[i] * dropout(first + static_cast<uint32_t>(i));
            norm(x, norm_weight, norm_shift, out + row * D, statistics + 2 * row, D, eps);
        }
    };
    multiply_together({x, K, 1}, {weight, 1, K}, bias, total, D, T, D, K, false, add_and_norm);
}

// gradient of out → gradients of residual and product (T, D), and of norm_weight, norm_shift and bias in sums (3, D)
void residual_norm_backward(const float* gradient, const float* total, const float* statistics,
                            const float* norm_weight, float* residual, float* product, float* sums, int64_t T,
                            int64_t D, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    ColumnSums columns(3 * D);
#pragma omp parallel
    {
        float *weights = columns.own(), *shifts = weights + D, *biases = shifts + D;
        const Share share = own_share(T);
        for (int64_t row = share.begin; row < share.end; row++) {
            float *r = residual + row * D, *y = product + row * D;
            const uint32_t first = static_cast<uint32_t>(row * D);
            norm_backward(gradient + row * D, total + row * D, statistics + 2 * row, norm_weight, r, weights, shifts,
                          D);
#pragma omp simd
            for (int64_t i = 0; i < D; i++) {
                y[i] = r[i] * dropout(first + static_cast<uint32_t>(i));
                biases[i] += y[i];
            }
        }
    }
    columns.write(sums, 0, 3 * D);
}

// total (T, D) = the words' + the positions' + the segments' vectors; out = dropout(LayerNorm(total)).
// ids, positions and segments (T) are places in the tables (…, D).  statistics (T, 2) as above.
void embed(const int32_t* ids, const int32_t* positions, const int32_t* segments, const float* words,
           const float* places, const float* types, const float* norm_weight, const float* norm_shift, float* total,
           float* out, float* statistics, int64_t T, int64_t D, float eps, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
#pragma omp parallel for
    for (int64_t row = 0; row < T; row++) {
        const float *word = words + ids[row] * D, *place = places + positions[row] * D;
        const float* type = types + segments[row] * D;
        float *x = total + row * D, *y = out + row * D;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) x[i] = word[i] + place[i] + type[i];
        norm(x, norm_weight, norm_shift, y, statistics + 2 * row, D, eps);
        drop(y, y, D, dropout, static_cast<uint32_t>(row * D));
    }
}

// gradient (T, D) of out → that of the total, in its place, and added to the rows of the three tables' gradients; those
// of norm_weight and norm_shift in sums (2, D).
void embed_backward(float* gradient, const int32_t* ids, const int32_t* positions, const int32_t* segments,
                    const float* total, const float* statistics, const float* norm_weight, float* words, float* places,
                    float* types, float* sums, int64_t T, int64_t D, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    ColumnSums columns(2 * D);
#pragma omp parallel
    {
        float* weights = columns.own();
        const Share share = own_share(T), part = own_share(D);
        for (int64_t row = share.begin; row < share.end; row++) {
            float* g = gradient + row * D;
            drop(g, g, D, dropout, static_cast<uint32_t>(row * D));
            norm_backward(g, total + row * D, statistics + 2 * row, norm_weight, g, weights, weights + D, D);
        }
#pragma omp barrier
        for (int64_t row = 0; row < T; row++) {  // each thread some columns of every row: two tokens may be one word
            const float* g = gradient + row * D;
            for (float* out : {words + ids[row] * D, places + positions[row] * D, types + segments[row] * D})
#pragma omp simd
                for (int64_t i = part.begin; i < part.end; i++) out[i] += g[i];
        }
    }
    columns.write(sums, 0, 2 * D);
}

// qkv (T, 3·D): query, key, value of each token, its heads side by side → context (T, D), and for the way back weights
// (B, N, S, S), of which only the part is written that tokens look at.  sequence (B, S): the number of each token's
// sequence, which lies in one piece.
void attention(const float* qkv, const int32_t* sequence, float* weights, float* context, int64_t B, int64_t N,
               int64_t S, int64_t H, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    const int64_t D = N * H;
    const float scale = 1.0f / std::sqrt(static_cast<float>(H));
#pragma omp parallel for
    for (int64_t number = 0; number < B * N; number++) {
        const Head head = head_of(qkv, sequence, number, N, S, H);
        const Team alone{1, 0, block_memory(std::max(S, H), std::max(S, H))};
        float* dropped = scratch<1>(QUERIES * S);
        for (int64_t begin = 0; begin < S; begin += QUERIES) {
            const Block block = block_of(head.numbers, number, S, begin);
            const int64_t count = block.count, others = block.others;
            float* x = weights + block.first;
            multiply(alone, head.query.from(begin, 0), transposed(head.key.from(block.seen, 0)), nullptr, x, S, count,
                     others, H, false, nothing);
            for (int64_t i = 0; i < count; i++) {
                softmax_within(x + i * S, head.numbers + block.seen, head.numbers[begin + i], others, scale);
                if (p > 0.0f)
                    drop(x + i * S, dropped + i * others, others, dropout, static_cast<uint32_t>(block.first + i * S));
            }
            const Matrix kept = p > 0.0f ? rows_of(dropped, others) : rows_of(x, S);
            multiply(alone, kept, head.value.from(block.seen, 0), nullptr, context + head.context + begin * D, D, count,
                     H, others, false, nothing);
        }
    }
}

// gradient (T, D) of the context → that of qkv (T, 3·D), and its sums over the tokens of each row of the batch (B, 3·D)
void attention_backward(const float* gradient, const float* qkv, const int32_t* sequence, const float* weights,
                        float* qkv_gradient, float* sums, int64_t B, int64_t N, int64_t S, int64_t H, float p,
                        uint64_t seed) {
    const Dropout dropout(p, seed);
    const int64_t D = N * H;
    const float scale = 1.0f / std::sqrt(static_cast<float>(H));
#pragma omp parallel for
    for (int64_t number = 0; number < B * N; number++) {
        const Head head = head_of(qkv, sequence, number, N, S, H);
        const Matrix above = rows_of(gradient + head.context, D);
        float *d_query = qkv_gradient + head.place, *d_key = d_query + D, *d_value = d_key + D;
        for (int64_t s = 0; s < S; s++)
            for (float* start : {d_key, d_value}) std::fill(start + s * 3 * D, start + s * 3 * D + H, 0.0f);
        const Team alone{1, 0, block_memory(std::max(S, H), std::max(S, H))};
        float *dropped = scratch<1>(QUERIES * S), *d_scores = scratch<2>(QUERIES * S);
        for (int64_t begin = 0; begin < S; begin += QUERIES) {
            const Block block = block_of(head.numbers, number, S, begin);
            const int64_t count = block.count, others = block.others, seen = block.seen;
            const float* x = weights + block.first;
            const Matrix own = above.from(begin, 0);
            multiply(alone, own, transposed(head.value.from(seen, 0)), nullptr, d_scores, others, count, others, H,
                     false, nothing);
            for (int64_t i = 0; i < count; i++) {
                float *y = dropped + i * others, *g = d_scores + i * others;
                drop(x + i * S, y, others, dropout, static_cast<uint32_t>(block.first + i * S));
                softmax_backward(g, x + i * S, y, others, scale);
            }
            const Matrix kept = rows_of(dropped, others), scores = rows_of(d_scores, others);
            multiply(alone, scores, head.key.from(seen, 0), nullptr, d_query + begin * 3 * D, 3 * D, count, H, others,
                     false, nothing);
            multiply(alone, transposed(scores), head.query.from(begin, 0), nullptr, d_key + seen * 3 * D, 3 * D, others,
                     H, count, true, nothing);
            multiply(alone, transposed(kept), own, nullptr, d_value + seen * 3 * D, 3 * D, others, H, count, true,
                     nothing);
        }
        float* total = sums + head.place - number / N * (S - 1) * 3 * D;  // the head's place in a row of (B, 3·D)
        for (int64_t which = 0; which < 3; which++, total += D) {
            std::fill(total, total + H, 0.0f);
            for (int64_t s = 0; s < S; s++)
                for (int64_t h = 0; h < H; h++) total[h] += d_query[(s * 3 + which) * D + h];
        }
    }
}

// product (T, V) + bias (V) are scores.  losses (T): cross entropy of each row against its label, times `share`; 0
// where the label is below 0.  The product becomes the gradient of the sum of the losses, and bias_gradient that of the
// bias.
void cross_entropy(float* product, const float* bias, const int64_t* labels, float* losses, float* bias_gradient,
                   int64_t T, int64_t V, float share_of_row) {
    ColumnSums columns(V);
#pragma omp parallel
    {
        float* biases = columns.own();
        const Share share = own_share(T);
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

}  // extern "C"
