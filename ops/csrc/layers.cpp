// The parts of a BERT layer and the masked-LM loss on CPUs, in fp32, forward and backward.
//
// ops/cpu_kernels.py compiles this file when a run starts.  Arrays are dense and row-major.
// Dropout stores no mask: a hash of a seed and i decides about element i, and the backward pass computes it again.
//
// Legend: B rows in the batch, S tokens in a row, T = B·S, N heads, H head size, D = N·H hidden size, V vocabulary.

#include "shared_gemm.h"

namespace {

constexpr int64_t ROWS = 32;      // that a thread takes at a time where it works on rows
constexpr int64_t LOGITS = 16;    // rows of logits that a thread takes at a time
constexpr int64_t ELEMENTS = 1 << 14;  // that a thread takes at a time where they are all alike
constexpr int64_t FEATURES = 64;  // columns of the tables' gradients that a thread takes at a time
constexpr int64_t QUERIES = 128;  // per block: their scores against 512 tokens stay in the L2 cache

Matrix rows_of(const float* data, int64_t stride) { return {data, stride, 1}; }

Matrix transposed(Matrix matrix) { return {matrix.data, matrix.column, matrix.row}; }

// One head of one row of the batch, in the arrays qkv (T, 3·D) and context (T, D).
struct Head {
    Matrix query, key, value;
    const int32_t* numbers;  // of its tokens' sequences
    int64_t qkv_offset, context_offset;  // of its first element in the arrays
};

Head head_of(const float* qkv, const int32_t* sequence, int64_t head, int64_t N, int64_t S, int64_t H) {
    const int64_t D = N * H, token = head / N * S, column = head % N * H;
    const Matrix query = rows_of(qkv + token * 3 * D + column, 3 * D);
    return {query, query.from(0, D), query.from(0, 2 * D), sequence + token, token * 3 * D + column,
            token * D + column};
}

// `count` queries from `begin` on, and the `keys` tokens from `first_key` on that they attend to: those of the queries'
// sequences, which are contiguous, extended to whole tiles.  `offset`: of the first weight in (B, N, S, S).
struct Block {
    int64_t begin, count, first_key, keys, offset;
};

Block block_of(const int32_t* numbers, int64_t head, int64_t S, int64_t begin) {
    const int64_t count = std::min(QUERIES, S - begin), last = begin + count - 1;
    int64_t first_key = begin, end = last + 1;
    while (first_key > 0 && numbers[first_key - 1] == numbers[begin]) first_key--;
    while (end < S && numbers[end] == numbers[last]) end++;
    first_key = first_key / WIDTH * WIDTH;
    end = std::min(S, (end + WIDTH - 1) / WIDTH * WIDTH);
    return {begin, count, first_key, end - first_key, (head * S + begin) * S + first_key};
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

// y (count) = dropout(x), where x[0] is element `first` of the whole array
void drop(const float* x, float* y, int64_t count, Dropout dropout, uint32_t first) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * dropout(first + static_cast<uint32_t>(i));
}

// gradient g (count) of y = dropout(x), x the softmax's weights → gradient of the scores, in place
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

// gradient g (D) of LayerNorm(x) → out, that of x; adds those of weight and shift to weights and shifts
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

// A product c (M, N) = a (M, K) · b (K, N) + bias (N, or null), or += a · b.  a and b may be transposed views: the strides
// of their rows and columns are given.
struct Product {
    const float* a;
    int64_t a_row, a_column;
    const float* b;
    int64_t b_row, b_column;
    const float* bias;
    float* c;
    int64_t M, N, K, add;
};

// `count` products, none of which reads what another one writes.
void gemms(const Product* products, int64_t count) {
    std::vector<Gemm> all;
    for (const Product* p = products; p < products + count; p++)
        all.push_back({{p->a, p->a_row, p->a_column}, {p->b, p->b_row, p->b_column}, p->bias, p->c, p->N, p->M, p->N,
                       p->K, p->add != 0});
    gemms_shared(all, no_epilogue);
}

// inner (T, F) = x (T, D) · weightᵀ + bias; out = GELU(inner).  weight (F, D).
void dense_gelu(const float* x, const float* weight, const float* bias, float* inner, float* out, int64_t T, int64_t F,
                int64_t D) {
    const auto gelu = [=](int64_t, int64_t row, int64_t rows, int64_t column, int64_t columns) {
        for (int64_t at = row * F + column; at < (row + rows) * F; at += F)
#pragma omp simd
            for (int64_t i = at; i < at + columns; i++) out[i] = inner[i] * normal(inner[i]).cumulative;
    };
    gemms_shared({{{x, D, 1}, {weight, 1, D}, bias, inner, F, T, F, D, false}}, gelu);
}

// gradient (T, D) of GELU(inner) · weightᵀ → those of inner (T, F) and of the bias (F) in it.  weight (D, F).
void gelu_backward(const float* gradient, const float* weight, const float* inner, float* inner_gradient,
                   float* bias_gradient, int64_t T, int64_t F, int64_t D) {
    const Gemm product{{gradient, D, 1}, {weight, F, 1}, nullptr, inner_gradient, F, T, F, D, false};
    ColumnSums sums(product.units(), F);
    const auto derive = [=, &sums](int64_t unit, int64_t row, int64_t rows, int64_t column, int64_t columns) {
        float* biases = sums.of(unit) + column;
        for (; rows > 0; row++, rows--) {
            float* g = inner_gradient + row * F + column;
            const float* x = inner + row * F + column;
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) {
                const Normal at = normal(x[i]);
                g[i] *= at.cumulative + x[i] * at.density;
                biases[i] += g[i];
            }
        }
    };
    gemms_shared({product}, derive);
    sums.write(bias_gradient);
}

// total (T, D) = residual + dropout(x (T, K) · weightᵀ + bias); out = LayerNorm(total).  weight (D, K).
// statistics (T, 2): mean and 1/deviation of each row of total.
void dense_residual_norm(const float* x, const float* weight, const float* bias, const float* residual,
                         const float* norm_weight, const float* norm_shift, float* total, float* out, float* statistics,
                         int64_t T, int64_t D, int64_t K, float eps, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    const auto add_and_norm = [=](int64_t, int64_t row, int64_t rows, int64_t column, int64_t columns) {
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
    gemms_shared({{{x, K, 1}, {weight, 1, K}, bias, total, D, T, D, K, false}}, add_and_norm, true);
}

// gradient (T, D) of out → gradients of residual and of x · weightᵀ (dense), (T, D), and of norm_weight, norm_shift and
// bias in sums (3, D)
void residual_norm_backward(const float* gradient, const float* total, const float* statistics,
                            const float* norm_weight, float* residual, float* dense, float* sums, int64_t T,
                            int64_t D, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    const int64_t parts = parts_of(T, ROWS);
    ColumnSums columns(parts, 3 * D);
    in_parts(parts, [&](int64_t part) {
        float *weights = columns.of(part), *shifts = weights + D, *biases = shifts + D;
        const Range range = part_of(T, ROWS, part);
        for (int64_t row = range.begin; row < range.end; row++) {
            float *r = residual + row * D, *y = dense + row * D;
            const uint32_t first = static_cast<uint32_t>(row * D);
            norm_backward(gradient + row * D, total + row * D, statistics + 2 * row, norm_weight, r, weights, shifts,
                          D);
#pragma omp simd
            for (int64_t i = 0; i < D; i++) {
                y[i] = r[i] * dropout(first + static_cast<uint32_t>(i));
                biases[i] += y[i];
            }
        }
    });
    columns.write(sums);
}

// total (T, D) = word_table[ids] + position_table[positions] + segment_table[segments],
// out = dropout(LayerNorm(total)).  ids, positions and segments (T), tables (…, D), statistics (T, 2) as above.
void embed(const int32_t* ids, const int32_t* positions, const int32_t* segments, const float* word_table,
           const float* position_table, const float* segment_table, const float* norm_weight, const float* norm_shift,
           float* total, float* out, float* statistics, int64_t T, int64_t D, float eps, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    in_parts(parts_of(T, ROWS), [=](int64_t part) {
        const Range range = part_of(T, ROWS, part);
        for (int64_t row = range.begin; row < range.end; row++) {
            const float *word = word_table + ids[row] * D, *position = position_table + positions[row] * D;
            const float* segment = segment_table + segments[row] * D;
            float *x = total + row * D, *y = out + row * D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) x[i] = word[i] + position[i] + segment[i];
            norm(x, norm_weight, norm_shift, y, statistics + 2 * row, D, eps);
            drop(y, y, D, dropout, static_cast<uint32_t>(row * D));
        }
    });
}

// gradient (T, D) of out → that of total, in place, which is added to the rows of the tables' gradients; those of
// norm_weight and norm_shift in sums (2, D).
void embed_backward(float* gradient, const int32_t* ids, const int32_t* positions, const int32_t* segments,
                    const float* total, const float* statistics, const float* norm_weight, float* word_gradient,
                    float* position_gradient, float* segment_gradient, float* sums, int64_t T, int64_t D, float p,
                    uint64_t seed) {
    const Dropout dropout(p, seed);
    const int64_t parts = parts_of(T, ROWS);
    ColumnSums columns(parts, 2 * D);
    in_parts(parts, [&](int64_t part) {
        float* weights = columns.of(part);
        const Range range = part_of(T, ROWS, part);
        for (int64_t row = range.begin; row < range.end; row++) {
            float* g = gradient + row * D;
            drop(g, g, D, dropout, static_cast<uint32_t>(row * D));
            norm_backward(g, total + row * D, statistics + 2 * row, norm_weight, g, weights, weights + D, D);
        }
    });
    columns.write(sums);
    in_parts(parts_of(D, FEATURES), [=](int64_t part) {  // some columns of all rows: ids repeat
        const Range range = part_of(D, FEATURES, part);
        for (int64_t row = 0; row < T; row++) {
            const float* g = gradient + row * D;
            for (float* out : {word_gradient + ids[row] * D, position_gradient + positions[row] * D,
                               segment_gradient + segments[row] * D})
#pragma omp simd
                for (int64_t i = range.begin; i < range.end; i++) out[i] += g[i];
        }
    });
}

// qkv (T, 3·D): query, key and value of each token, with its heads side by side → context (T, D), and for the backward
// pass weights (B, N, S, S), of which only the part within sequences is written.  sequence (B, S): the number of each
// token's sequence; sequences are contiguous.
void attention(const float* qkv, const int32_t* sequence, float* weights, float* context, int64_t B, int64_t N,
               int64_t S, int64_t H, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    const int64_t D = N * H;
    const float scale = 1.0f / std::sqrt(static_cast<float>(H));
    in_parts(B * N, [=](int64_t number) {
        const Head head = head_of(qkv, sequence, number, N, S, H);
        float* dropped = scratch<1>(QUERIES * S);
        for (int64_t begin = 0; begin < S; begin += QUERIES) {
            const Block block = block_of(head.numbers, number, S, begin);
            const int64_t count = block.count, keys = block.keys;
            float* x = weights + block.offset;
            gemm_alone({head.query.from(begin, 0), transposed(head.key.from(block.first_key, 0)), nullptr, x, S, count,
                        keys, H, false});
            for (int64_t i = 0; i < count; i++) {
                softmax_within(x + i * S, head.numbers + block.first_key, head.numbers[begin + i], keys, scale);
                if (p > 0.0f)
                    drop(x + i * S, dropped + i * keys, keys, dropout, static_cast<uint32_t>(block.offset + i * S));
            }
            const Matrix kept = p > 0.0f ? rows_of(dropped, keys) : rows_of(x, S);
            gemm_alone({kept, head.value.from(block.first_key, 0), nullptr,
                        context + head.context_offset + begin * D, D, count, H, keys, false});
        }
    });
}

// gradient (T, D) of context → that of qkv (T, 3·D), and its sums over the tokens of each row of the batch (B, 3·D)
void attention_backward(const float* gradient, const float* qkv, const int32_t* sequence, const float* weights,
                        float* qkv_gradient, float* sums, int64_t B, int64_t N, int64_t S, int64_t H, float p,
                        uint64_t seed) {
    const Dropout dropout(p, seed);
    const int64_t D = N * H;
    const float scale = 1.0f / std::sqrt(static_cast<float>(H));
    in_parts(B * N, [=](int64_t number) {
        const Head head = head_of(qkv, sequence, number, N, S, H);
        const Matrix above = rows_of(gradient + head.context_offset, D);
        float *d_query = qkv_gradient + head.qkv_offset, *d_key = d_query + D, *d_value = d_key + D;
        for (int64_t s = 0; s < S; s++)
            for (float* start : {d_key, d_value}) std::fill(start + s * 3 * D, start + s * 3 * D + H, 0.0f);
        float *dropped = scratch<1>(QUERIES * S), *d_scores = scratch<2>(QUERIES * S);
        for (int64_t begin = 0; begin < S; begin += QUERIES) {
            const Block block = block_of(head.numbers, number, S, begin);
            const int64_t count = block.count, keys = block.keys, first_key = block.first_key;
            const float* x = weights + block.offset;
            const Matrix own = above.from(begin, 0);
            gemm_alone({own, transposed(head.value.from(first_key, 0)), nullptr, d_scores, keys, count, keys, H,
                        false});
            for (int64_t i = 0; i < count; i++) {
                float *y = dropped + i * keys, *g = d_scores + i * keys;
                drop(x + i * S, y, keys, dropout, static_cast<uint32_t>(block.offset + i * S));
                softmax_backward(g, x + i * S, y, keys, scale);
            }
            const Matrix kept = rows_of(dropped, keys), scores = rows_of(d_scores, keys);
            gemm_alone({scores, head.key.from(first_key, 0), nullptr, d_query + begin * 3 * D, 3 * D, count, H, keys,
                        false});
            gemm_alone({transposed(scores), head.query.from(begin, 0), nullptr, d_key + first_key * 3 * D, 3 * D, keys,
                        H, count, true});
            gemm_alone({transposed(kept), own, nullptr, d_value + first_key * 3 * D, 3 * D, keys, H, count, true});
        }
        float* total = sums + head.qkv_offset - number / N * (S - 1) * 3 * D;  // the head's columns of (B, 3·D)
        for (int64_t which = 0; which < 3; which++, total += D) {
            std::fill(total, total + H, 0.0f);
            for (int64_t s = 0; s < S; s++)
                for (int64_t h = 0; h < H; h++) total[h] += d_query[(s * 3 + which) * D + h];
        }
    });
}

// y = dropout(x), `count` numbers.
void dropout_fp32(const float* x, float* y, int64_t count, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    in_parts(parts_of(count, ELEMENTS), [=](int64_t part) {
        const Range range = part_of(count, ELEMENTS, part);
        drop(x + range.begin, y + range.begin, range.end - range.begin, dropout, static_cast<uint32_t>(range.begin));
    });
}

// The same in bf16, the upper half of an fp32 number: rounded to the nearest, of two to the even one.
void dropout_bf16(const uint16_t* x, uint16_t* y, int64_t count, float p, uint64_t seed) {
    const Dropout dropout(p, seed);
    in_parts(parts_of(count, ELEMENTS), [=](int64_t part) {
        const Range range = part_of(count, ELEMENTS, part);
#pragma omp simd
        for (int64_t i = range.begin; i < range.end; i++) {
            const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
            float number;
            std::memcpy(&number, &bits, sizeof(number));
            number *= dropout(static_cast<uint32_t>(i));
            uint32_t out;
            std::memcpy(&out, &number, sizeof(out));
            const uint16_t rounded = static_cast<uint16_t>((out + 0x7fff + (out >> 16 & 1)) >> 16);
            y[i] = number == number ? rounded : 0x7fc0;  // rounding could make a NaN infinite
        }
    });
}

// losses (T): cross entropy of logits (T, V) + bias (V) against labels (T), times `scale`; 0 where a label is
// negative.  The gradient of the sum of the losses by the logits overwrites them, that by bias goes to bias_gradient.
void cross_entropy(float* logits, const float* bias, const int64_t* labels, float* losses, float* bias_gradient,
                   int64_t T, int64_t V, float scale) {
    const int64_t parts = parts_of(T, LOGITS);
    ColumnSums columns(parts, V);
    in_parts(parts, [&](int64_t part) {
        float* biases = columns.of(part);
        const Range range = part_of(T, LOGITS, part);
        for (int64_t row = range.begin; row < range.end; row++) {
            float* x = logits + row * V;
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
            const float logit = x[labels[row]];
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < V; i++) {
                x[i] = exponential(x[i] - highest);
                sum += x[i];
            }
            losses[row] = (highest + std::log(sum) - logit) * scale;
            const float factor = scale / sum;
#pragma omp simd
            for (int64_t i = 0; i < V; i++) {
                x[i] *= factor;
                biases[i] += x[i];
            }
            x[labels[row]] -= scale;
            biases[labels[row]] -= scale;
        }
    });
    columns.write(bias_gradient);
}

}  // extern "C"
