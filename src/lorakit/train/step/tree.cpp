// Attention over a packed batch whose runs of tokens form a tree, forward and backward, on a processor: what batched_attention.py does with
// batched products, which the tests hold it to, in one pass over each run and without the copies. Numbers are added up in
// float32. Compiled at first use for this machine.
//
// A unit of work is one run and one key head: its queries (of all heads that share the key head) against the keys of its path,
// the runs above it, and its own. Position in that list of keys is position in the example, so causality and window are
// comparisons of two indices. What the backward pass needs besides q, k, v is the output and the log of each softmax's sum.
// Gradients of keys that several runs see are added up by each worker for itself and then in the order of the workers, so that
// the same number of threads gives the same bits.

#include <algorithm>
#include <numeric>

#include "vector.h"

typedef int64_t integer;

// ---------------------------------------------------------------------------------------------------------------------
// A product of small matrices: C (m, n) = or += A (m, k) B (k, n). B and C have their rows contiguous and n is a multiple of
// 16; A may lie either way. As many sums as the processor has registers for are kept at once.

#if defined(__AVX512F__)
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = 3, VECTORS = 2;
#endif

template <int M, int V>
static void block(integer k, const float* a, integer row, integer column, const float* b, integer b_row, float* c,
                  integer c_row, bool add) {
    v16 sums[M][V];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) sums[i][j] = add ? load(c + i * c_row + 16 * j) : v16{};
    for (integer s = 0; s < k; s++) {
        v16 right[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) right[j] = load(b + s * b_row + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const float left = a[i * row + s * column];
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) sums[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) keep(sums[i][j], c + i * c_row + 16 * j);
}

template <int V>
static void columns(integer m, integer k, const float* a, integer row, integer column, const float* b, integer b_row,
                    float* c, integer c_row, bool add) {
    integer i = 0;
    for (; i + ROWS <= m; i += ROWS) block<ROWS, V>(k, a + i * row, row, column, b, b_row, c + i * c_row, c_row, add);
    for (; i + 2 <= m; i += 2) block<2, V>(k, a + i * row, row, column, b, b_row, c + i * c_row, c_row, add);
    for (; i < m; i++) block<1, V>(k, a + i * row, row, column, b, b_row, c + i * c_row, c_row, add);
}

static void multiply(integer m, integer n, integer k, const float* a, integer row, integer column, const float* b,
                     integer b_row, float* c, integer c_row, bool add) {
    integer j = 0;
    for (; j + 16 * VECTORS <= n; j += 16 * VECTORS)
        columns<VECTORS>(m, k, a, row, column, b + j, b_row, c + j, c_row, add);
    for (; j + 32 <= n; j += 32) columns<2>(m, k, a, row, column, b + j, b_row, c + j, c_row, add);
    for (; j < n; j += 16) columns<1>(m, k, a, row, column, b + j, b_row, c + j, c_row, add);
}

// ---------------------------------------------------------------------------------------------------------------------
// The tree

struct Run {
    integer start, length, position, parent;
};

struct Shape {
    const Run* runs;
    integer count, tokens, used, heads, key_heads, d;
    float scale;
    integer window;  // 0: all that came before

    integer fold() const { return heads / key_heads; }
    integer tile() const { return std::max<integer>(8, 96 / fold()); }  // tokens whose scores are held at once
};

static integer up16(integer n) { return (n + 15) / 16 * 16; }

// The keys that a run sees, first to last: the runs above it and itself.
static std::vector<integer> path_of(const Shape& shape, integer run) {
    std::vector<integer> path;
    for (integer at = run; at >= 0; at = shape.runs[at].parent) path.push_back(at);
    std::reverse(path.begin(), path.end());
    return path;
}

// Units, the dearest first: run * key_heads + head.
static std::vector<integer> units_of(const Shape& shape, std::vector<integer>& costs) {
    costs.resize(shape.count * shape.key_heads);
    for (integer run = 0; run < shape.count; run++)
        for (integer head = 0; head < shape.key_heads; head++)
            costs[run * shape.key_heads + head] =
                shape.runs[run].length * (shape.runs[run].position + shape.runs[run].length + 16);
    std::vector<integer> units(costs.size());
    std::iota(units.begin(), units.end(), 0);
    std::stable_sort(units.begin(), units.end(), [&](integer a, integer b) { return costs[a] > costs[b]; });
    return units;
}

// One unit's keys (and values) in float32: rows as they come, or transposed, (d, width) with zeros behind the last key.
template <typename T>
static void gather(const Shape& shape, const std::vector<integer>& path, integer head, const T* from, float* rows,
                   float* turned, integer width) {
    const integer d = shape.d;
    integer at = 0;
    std::vector<float> row(d);
    for (integer run : path)
        for (integer t = 0; t < shape.runs[run].length; t++, at++) {
            float* wide = rows ? rows + at * d : row.data();
            widen_all(from + ((shape.runs[run].start + t) * shape.key_heads + head) * d, wide, d);
            if (turned)
                for (integer i = 0; i < d; i++) turned[i * width + at] = wide[i];
        }
    if (turned)
        for (integer i = 0; i < d; i++) std::fill(turned + i * width + at, turned + (i + 1) * width, 0.0f);
}

// Where the keys of a tile of queries lie: those from `first` (a multiple of 16) to `end`, `width` with the fill.
struct Seen {
    integer first, end, width;
};
static Seen seen_by(const Shape& shape, integer position, integer tokens) {
    const integer end = position + tokens;
    integer first = shape.window > 0 ? std::max<integer>(0, position - shape.window + 1) : 0;
    first = first / 16 * 16;
    return {first, end, up16(end - first)};
}
static const v16 steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <typename T>
static void attend(const Shape& shape, const T* q, const T* k, const T* v, T* out, float* log_sums) {
    const integer d = shape.d, fold = shape.fold(), tile = shape.tile();
    std::vector<integer> costs;
    const std::vector<integer> units = units_of(shape, costs);
    std::fill(out + shape.used * shape.heads * d, out + shape.tokens * shape.heads * d, T(0));
    std::fill(log_sums + shape.used * shape.heads, log_sums + shape.tokens * shape.heads, 0.0f);
#pragma omp parallel
    {
        std::vector<float> memory;
#pragma omp for schedule(dynamic, 1)
        for (size_t u = 0; u < units.size(); u++) {
            const integer head = units[u] % shape.key_heads;
            const Run run = shape.runs[units[u] / shape.key_heads];
            const std::vector<integer> path = path_of(shape, units[u] / shape.key_heads);
            const integer width = up16(run.position + run.length), most = std::min(tile, run.length) * fold;
            memory.resize(width * d * 2 + most * (2 * d + width));
            float *turned = memory.data(), *values = turned + width * d, *queries = values + width * d;
            float *scores = queries + most * d, *result = scores + most * width;
            gather<T>(shape, path, head, k, nullptr, turned, width);
            gather<T>(shape, path, head, v, values, nullptr, width);
            for (integer begin = 0; begin < run.length; begin += tile) {
                const integer count = std::min(tile, run.length - begin), rows = count * fold;
                const Seen seen = seen_by(shape, run.position + begin, count);
                for (integer i = 0; i < count; i++) {
                    float* to = queries + i * fold * d;
                    widen_all(q + ((run.start + begin + i) * shape.heads + head * fold) * d, to, fold * d);
                    for (integer c = 0; c < fold * d; c += 16) keep(load(to + c) * shape.scale, to + c);
                }
                multiply(rows, seen.width, d, queries, d, 1, turned + seen.first, width, scores, seen.width, false);
                for (integer r = 0; r < rows; r++) {
                    float* own = scores + r * seen.width;
                    const integer here = run.position + begin + r / fold;
                    const v16 last = all(float(here - seen.first));
                    const v16 low = all(shape.window > 0 ? float(here - shape.window - seen.first) : -1.0f);
                    v16 tops = all(-INFINITY), at = steps;
                    for (integer j = 0; j < seen.width; j += 16, at += 16.0f) {
                        v16 x = load(own + j);
                        x = (at <= last) & (at > low) ? x : all(-INFINITY);
                        tops = x > tops ? x : tops;
                        keep(x, own + j);
                    }
                    float top = tops[0];
                    for (int i = 1; i < 16; i++) top = tops[i] > top ? tops[i] : top;
                    v16 total{};
                    for (integer j = 0; j < seen.width; j += 16) {
                        v16 x = load(own + j);
                        v16 p = x == -INFINITY ? v16{} : exponential(x - top);
                        total += p;
                        keep(p, own + j);
                    }
                    const float whole = sum(total), share = 1.0f / whole;
                    for (integer j = 0; j < seen.width; j += 16) keep(load(own + j) * share, own + j);
                    log_sums[(run.start + begin + r / fold) * shape.heads + head * fold + r % fold] = top + std::log(whole);
                }
                multiply(rows, d, seen.end - seen.first, scores, seen.width, 1, values + seen.first * d, d, result, d, false);
                for (integer i = 0; i < count; i++)
                    narrow_all(result + i * fold * d, out + ((run.start + begin + i) * shape.heads + head * fold) * d, fold * d);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

template <typename T>
static void attend_backward(const Shape& shape, const T* q, const T* k, const T* v, const T* out, const float* log_sums,
                            const T* dout, T* dq, T* dk, T* dv, integer workers) {
    const integer d = shape.d, fold = shape.fold(), tile = shape.tile(), line = shape.key_heads * d;
    std::vector<integer> costs;
    const std::vector<integer> units = units_of(shape, costs);
    workers = std::min<integer>(workers, units.size());
    std::vector<std::vector<integer>> work(workers);
    std::vector<integer> load_of(workers, 0);
    for (integer unit : units) {  // the dearest first, each to whoever has least to do
        const integer who = std::min_element(load_of.begin(), load_of.end()) - load_of.begin();
        work[who].push_back(unit), load_of[who] += costs[unit];
    }
    // Runs that others hang on, and where their rows lie among the rows of all such runs.
    std::vector<integer> shared(shape.count, -1);
    for (integer run = 0; run < shape.count; run++)
        if (shape.runs[run].parent >= 0) shared[shape.runs[run].parent] = 0;
    integer shared_rows = 0;
    for (integer run = 0; run < shape.count; run++)
        if (shared[run] == 0) shared[run] = shared_rows, shared_rows += shape.runs[run].length;
    const integer half = shared_rows * line;
    std::vector<float> added(workers * 2 * half, 0.0f);
    for (T* filled : {dk, dv}) std::fill(filled + shape.used * line, filled + shape.tokens * line, T(0));
    std::fill(dq + shape.used * shape.heads * d, dq + shape.tokens * shape.heads * d, T(0));
#pragma omp parallel num_threads(int(workers))
    {
        std::vector<float> memory;
#pragma omp for schedule(static, 1)
        for (integer who = 0; who < workers; who++)
            for (integer unit : work[who]) {
                const integer own_run = unit / shape.key_heads, head = unit % shape.key_heads;
                const Run run = shape.runs[own_run];
                const std::vector<integer> path = path_of(shape, own_run);
                const integer length = run.position + run.length, width = up16(length);
                const integer most = std::min(tile, run.length) * fold;
                memory.resize(5 * width * d + most * (3 * d + 2 * width));
                float *keys = memory.data(), *turned = keys + width * d, *values = turned + width * d;
                float *of_keys = values + width * d, *of_values = of_keys + width * d, *queries = of_values + width * d;
                float *slopes = queries + most * d, *of_queries = slopes + most * d;
                float *p = of_queries + most * d, *dp = p + most * width;
                gather<T>(shape, path, head, k, keys, turned, width);
                gather<T>(shape, path, head, v, nullptr, values, width);
                std::fill(of_keys, of_keys + 2 * width * d, 0.0f);
                for (integer begin = 0; begin < run.length; begin += tile) {
                    const integer count = std::min(tile, run.length - begin), rows = count * fold;
                    const Seen seen = seen_by(shape, run.position + begin, count);
                    const integer keys_seen = seen.end - seen.first;
                    for (integer i = 0; i < count; i++) {
                        const integer at = ((run.start + begin + i) * shape.heads + head * fold) * d;
                        float* to = queries + i * fold * d;
                        widen_all(q + at, to, fold * d);
                        for (integer c = 0; c < fold * d; c += 16) keep(load(to + c) * shape.scale, to + c);
                        widen_all(dout + at, slopes + i * fold * d, fold * d);
                    }
                    multiply(rows, seen.width, d, queries, d, 1, turned + seen.first, width, p, seen.width, false);
                    multiply(rows, seen.width, d, slopes, d, 1, values + seen.first, width, dp, seen.width, false);
                    for (integer r = 0; r < rows; r++) {
                        const integer token = run.start + begin + r / fold, place = token * shape.heads + head * fold + r % fold;
                        v16 inner{};
                        for (integer c = 0; c < d; c += 16) inner += load(out + place * d + c) * load(slopes + r * d + c);
                        const float delta = sum(inner), log_sum = log_sums[place];
                        const integer here = run.position + begin + r / fold;
                        const v16 last = all(float(here - seen.first));
                        const v16 low = all(shape.window > 0 ? float(here - shape.window - seen.first) : -1.0f);
                        v16 at = steps;
                        for (integer j = 0; j < seen.width; j += 16, at += 16.0f) {
                            float *x = p + r * seen.width + j, *y = dp + r * seen.width + j;
                            v16 share = exponential(load(x) - log_sum);
                            share = (at <= last) & (at > low) ? share : v16{};
                            keep(share * (load(y) - delta), y);
                            keep(share, x);
                        }
                    }
                    multiply(keys_seen, d, rows, p, 1, seen.width, slopes, d, of_values + seen.first * d, d, true);
                    multiply(keys_seen, d, rows, dp, 1, seen.width, queries, d, of_keys + seen.first * d, d, true);
                    multiply(rows, d, keys_seen, dp, seen.width, 1, keys + seen.first * d, d, of_queries, d, false);
                    for (integer i = 0; i < count; i++) {
                        float* from = of_queries + i * fold * d;
                        for (integer c = 0; c < fold * d; c += 16) keep(load(from + c) * shape.scale, from + c);
                        narrow_all(from, dq + ((run.start + begin + i) * shape.heads + head * fold) * d, fold * d);
                    }
                }
                integer at = 0;
                for (integer seen_run : path)
                    for (integer t = 0; t < shape.runs[seen_run].length; t++, at++) {
                        if (shared[seen_run] < 0) {  // nobody else sees it
                            const integer place = (shape.runs[seen_run].start + t) * line + head * d;
                            narrow_all(of_keys + at * d, dk + place, d);
                            narrow_all(of_values + at * d, dv + place, d);
                            continue;
                        }
                        float* to = added.data() + who * 2 * half + (shared[seen_run] + t) * line + head * d;
                        for (integer c = 0; c < d; c += 16) {
                            keep(load(to + c) + load(of_keys + at * d + c), to + c);
                            keep(load(to + half + c) + load(of_values + at * d + c), to + half + c);
                        }
                    }
            }
    }
    for (integer run = 0; run < shape.count; run++)
        if (shared[run] >= 0)
            for (int which = 0; which < 2; which++) {
                float* first = added.data() + which * half + shared[run] * line;
                const integer count = shape.runs[run].length * line;
                for (integer who = 1; who < workers; who++) {
                    const float* more = first + who * 2 * half;
                    for (integer c = 0; c < count; c += 16) keep(load(first + c) + load(more + c), first + c);
                }
                narrow_all(first, (which ? dv : dk) + shape.runs[run].start * line, count);
            }
}

#define FOR(T, name)                                                                                                        \
    extern "C" void attend_##name(const Run* runs, integer count, integer tokens, integer used, integer heads,              \
                                  integer key_heads, integer d, float scale, integer window, const T* q, const T* k,        \
                                  const T* v, T* out, float* log_sums) {                                                    \
        attend<T>({runs, count, tokens, used, heads, key_heads, d, scale, window}, q, k, v, out, log_sums);                 \
    }                                                                                                                       \
    extern "C" void attend_backward_##name(const Run* runs, integer count, integer tokens, integer used, integer heads,     \
                                           integer key_heads, integer d, float scale, integer window, const T* q,           \
                                           const T* k, const T* v, const T* out, const float* log_sums, const T* dout,      \
                                           T* dq, T* dk, T* dv, integer workers) {                                          \
        attend_backward<T>({runs, count, tokens, used, heads, key_heads, d, scale, window}, q, k, v, out, log_sums, dout,   \
                           dq, dk, dv, workers);                                                                            \
    }
FOR(float, float32)
FOR(bf16, bfloat16)
