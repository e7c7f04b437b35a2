// Linear layers with their adapters, for processors that multiply bfloat16: y = x Wᵀ + bias + what the adapters add.
//
// A weight lies in panels of 48 outputs, and within a panel two inputs of an output side by side, as the instruction wants them.
// All layers that read the same x (q, k and v; gate and up) are one call: one start of the threads, and while one of them
// multiplies another reads adapters. Tokens of the same adapters are taken eight at a time, so that these are read once.

#include <atomic>

#include <omp.h>

#include "adapters.h"
#include "blocked.h"

#if defined(__AVX512BF16__)

// A layer: its packed weight, its bias (0 for none), its sizes, its place in `linear_layers` of the model, and in what its
// weight lies (`Kind`; the same for all layers of a call).
struct Layer {
    int64_t weight, bias, in, out, number, kind;
};

constexpr int PANEL = 48, ROWS = 8, TOGETHER = 8;
constexpr int64_t AHEAD = 768;  // numbers that a weight is fetched ahead of its use

static inline __m512bh pairs_at(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline __m512bh pair_everywhere(const void* p) {
    int32_t two;
    memcpy(&two, p, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}
static inline __m256bh rounded(__m512 x) { return _mm512_cvtneps_pbh(x); }

// Tasks 0 to count - 1 among threads: each begins with a stretch of its own, then helps the others.
struct Stretches {
    struct alignas(64) Next {
        std::atomic<int64_t> value;
    };
    Next next[64];
    int64_t count, threads;
    void set(int64_t tasks, int64_t width) {
        count = tasks, threads = width < 64 ? width : 64;
        for (int64_t i = 0; i < threads; i++) next[i].value.store(count * i / threads, std::memory_order_relaxed);
    }
    template <typename Task>
    void run(int64_t thread, Task task) {
        for (int64_t i = 0; i < threads; i++) {
            const int64_t own = (thread + i) % threads, end = count * (own + 1) / threads;
            auto& value = next[own].value;
            int64_t n;
            while (value.load(std::memory_order_relaxed) < end &&
                   (n = value.fetch_add(1, std::memory_order_relaxed)) < end)
                task(n);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The base

// y (R rows, up to 48 columns) = bias + x (R rows, 2 * pairs) times a panel
template <int R>
static inline void multiply(const bf16* x, int64_t x_token, const bf16* panel, int64_t pairs, const float* bias, bf16* y,
                            int64_t y_token, int64_t columns) {
    __m512 c[R][3];
    for (int j = 0; j < 3; j++)
        for (int r = 0; r < R; r++) c[r][j] = _mm512_loadu_ps(bias + 16 * j);
    for (int64_t p = 0; p < pairs; p++) {
        const bf16* w = panel + p * 2 * PANEL;
        const __m512bh b0 = pairs_at(w), b1 = pairs_at(w + 32), b2 = pairs_at(w + 64);
        for (int j = 0; j < 3; j++) __builtin_prefetch(w + AHEAD + 32 * j);
        for (int r = 0; r < R; r++) {
            const __m512bh a = pair_everywhere(x + r * x_token + 2 * p);
            c[r][0] = _mm512_dpbf16_ps(c[r][0], b0, a);
            c[r][1] = _mm512_dpbf16_ps(c[r][1], b1, a);
            c[r][2] = _mm512_dpbf16_ps(c[r][2], b2, a);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 3 && columns > 16 * j; j++) {
            const int64_t left = columns - 16 * j;
            const __mmask16 mask = left >= 16 ? 0xffff : (1 << left) - 1;
            _mm256_mask_storeu_epi16(y + r * y_token + 16 * j, mask, (__m256i)rounded(c[r][j]));
        }
}

template <int R>
static void multiply_rest(int64_t rows, const bf16* x, int64_t x_token, const bf16* panel, int64_t pairs, const float* bias,
                          bf16* y, int64_t y_token, int64_t columns) {
    if (rows == R)
        multiply<R>(x, x_token, panel, pairs, bias, y, y_token, columns);
    else if constexpr (R > 1)
        multiply_rest<R - 1>(rows, x, x_token, panel, pairs, bias, y, y_token, columns);
}

static void multiply_panel(const Layer& layer, int64_t number, const bf16* x, int64_t x_token, bf16* y, int64_t tokens,
                           const Bytes& bytes) {
    const int64_t first = number * PANEL, columns = layer.out - first < PANEL ? layer.out - first : PANEL;
    float bias[PANEL] = {};
    if (layer.bias)
        for (int64_t i = 0; i < columns; i++) bias[i] = widen(reinterpret_cast<const bf16*>(layer.bias)[first + i]);
    if (layer.kind) {
        const int64_t size = 3 * layer.in / BLOCK * (layer.kind == Q8_0 ? sixteen<Q8_0> : sixteen<Q4_0>);
        const auto function = layer.kind == Q8_0 ? multiply_blocked_panel<Q8_0> : multiply_blocked_panel<Q4_0>;
        function(bytes, reinterpret_cast<const uint8_t*>(layer.weight) + number * size, layer.in, bias, y + first, layer.out,
                 columns, tokens);
        return;
    }
    const bf16* panel = reinterpret_cast<const bf16*>(layer.weight) + number * layer.in * PANEL;
    int64_t t = 0;
    for (; t + ROWS <= tokens; t += ROWS)
        multiply<ROWS>(x + t * x_token, x_token, panel, layer.in / 2, bias, y + t * layer.out + first, layer.out, columns);
    multiply_rest<ROWS - 1>(tokens - t, x + t * x_token, x_token, panel, layer.in / 2, bias, y + t * layer.out + first,
                            layer.out, columns);
}

// ---------------------------------------------------------------------------------------------------------------------
// The adapters: tokens of one tile have the same

// The sums of sixteen vectors; sum i comes to place `place(i)`.
static inline int place(int i) {
    constexpr int turned[4] = {0, 2, 1, 3};
    return 4 * turned[i / 4] + turned[i % 4];
}
static inline __m512 sums(const __m512 (&a)[16]) {
    __m512 b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
    for (int i = 0; i < 4; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
    for (int i = 0; i < 2; i++) d[i] = _mm512_add_ps(_mm512_unpacklo_ps(c[i], c[i + 2]), _mm512_unpackhi_ps(c[i], c[i + 2]));
    const __m512d e = (__m512d)d[0], f = (__m512d)d[1];
    return _mm512_add_ps((__m512)_mm512_unpacklo_pd(e, f), (__m512)_mm512_unpackhi_pd(e, f));
}

// weight * A x for T tokens and up to R ranks, as pairs of ranks: h[pair * TOGETHER + token]
template <int T, int R>
static inline void project(const bf16* A, int64_t ranks, const bf16* const* x, int64_t in, float weight, bf16* h) {
    const bf16* a[R];
    for (int r = 0; r < R; r++) a[r] = A + (r < ranks ? r : ranks - 1) * in;
    __m512 c[16];
    for (int i = 0; i < 16; i++) c[i] = _mm512_setzero_ps();
    for (int64_t i = 0; i < in; i += 32) {
        __m512bh b[T];
        for (int t = 0; t < T; t++) b[t] = pairs_at(x[t] + i);
        for (int r = 0; r < R; r++) {
            const __m512bh own = pairs_at(a[r] + i);
            for (int t = 0; t < T; t++) c[t * R + r] = _mm512_dpbf16_ps(c[t * R + r], own, b[t]);
        }
    }
    alignas(32) bf16 found[16];
    _mm256_store_si256((__m256i*)found, (__m256i)rounded(_mm512_mul_ps(sums(c), _mm512_set1_ps(weight))));
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R && r < ranks; r++) h[(r / 2 * TOGETHER + t) * 2 + r % 2] = found[place(t * R + r)];
}

static void project_entry(const Part& part, const bf16* const* x, int64_t tokens, int64_t in, float weight, bf16* h) {
    const bf16* A = reinterpret_cast<const bf16*>(part.A);
    for (int64_t t = 0; t < tokens;) {
        const int64_t left = tokens - t, step = left >= 4 ? 4 : left;
        const int64_t ranks = step > 2 ? 4 : 8;
        for (int64_t r = 0; r < part.rank; r += ranks) {
            bf16* to = h + (r / 2 * TOGETHER + t) * 2;
            if (step == 4)
                project<4, 4>(A + r * in, part.rank - r, x + t, in, weight, to);
            else if (step == 3)
                project<3, 4>(A + r * in, part.rank - r, x + t, in, weight, to);
            else if (step == 2)
                project<2, 8>(A + r * in, part.rank - r, x + t, in, weight, to);
            else
                project<1, 8>(A + r * in, part.rank - r, x + t, in, weight, to);
        }
        t += step;
    }
}

// y[T tokens][32 * C outputs from o on] += the entries' B h. Two ranks are woven into pairs as they are read, which leaves
// the outputs of a vector in another order until the end.
template <int T, int C>
static inline void expand(const Part* parts, int64_t from, int64_t to, const bf16* h, bf16* const* y, int64_t out, int64_t o) {
    __m512 low[T][C], high[T][C];
    for (int t = 0; t < T; t++)
        for (int j = 0; j < C; j++) low[t][j] = high[t][j] = _mm512_setzero_ps();
    for (int64_t e = from; e < to; e++) {
        const bf16* B = reinterpret_cast<const bf16*>(parts[e].B) + o;
        for (int64_t r = 0; r < parts[e].rank; r += 2, h += 2 * TOGETHER) {
            const bf16 *even = B + r * out, *odd = r + 1 < parts[e].rank ? even + out : even;  // its h is 0 where there is none
            for (int j = 0; j < C; j++) {
                const __m512i a = _mm512_loadu_si512(even + 32 * j), b = _mm512_loadu_si512(odd + 32 * j);
                const __m512bh l = (__m512bh)_mm512_unpacklo_epi16(a, b), u = (__m512bh)_mm512_unpackhi_epi16(a, b);
                for (int t = 0; t < T; t++) {
                    const __m512bh own = pair_everywhere(h + 2 * t);
                    low[t][j] = _mm512_dpbf16_ps(low[t][j], l, own);
                    high[t][j] = _mm512_dpbf16_ps(high[t][j], u, own);
                }
            }
        }
    }
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int t = 0; t < T; t++)
        for (int j = 0; j < C; j++) {
            bf16* at = y[t] + o + 32 * j;
            keep(load(at) + (v16)_mm512_permutex2var_ps(low[t][j], first, high[t][j]), at);
            keep(load(at + 16) + (v16)_mm512_permutex2var_ps(low[t][j], second, high[t][j]), at + 16);
        }
}

template <int T>
static void expand_tile(const Part* parts, int64_t from, int64_t to, const bf16* h, bf16* const* y, int64_t out) {
    constexpr int C = T == 1 ? 4 : T <= 4 ? 2 : 1;
    int64_t o = 0;
    for (; o + 32 * C <= out; o += 32 * C) expand<T, C>(parts, from, to, h, y, out, o);
    for (; o < out; o += 32) expand<T, 1>(parts, from, to, h, y, out, o);
}

template <int T>
static void expand_some(int64_t tokens, const Part* parts, int64_t from, int64_t to, const bf16* h, bf16* const* y, int64_t out) {
    if (tokens == T)
        expand_tile<T>(parts, from, to, h, y, out);
    else if constexpr (T > 1)
        expand_some<T - 1>(tokens, parts, from, to, h, y, out);
}

// What the adapters of a step are, and who has which: see batch.Mixture and batch.Batch.tiles_of_adapters.
struct Adapters {
    const Part* parts;  // (layers, entries)
    int64_t entries;
    const int32_t *row, *start;  // token -> run -> its first entry
    const float* weight;
    const int32_t *order, *tile;  // tokens sorted by their adapters, and where in it each tile begins
    int64_t tiles;

    const Part* of(const Layer& layer) const { return parts + layer.number * entries; }
    void span(int64_t number, int64_t& from, int64_t& to) const {
        const int32_t run = row[order[tile[number]]];
        from = start[run], to = start[run + 1];
    }
};

// Whether a tile's adapters are nothing but products of factors in this layer, and how many pairs of ranks they have.
static bool plain(const Layer& layer, const Part* parts, int64_t from, int64_t to, int64_t& pairs) {
    pairs = 0;
    for (int64_t e = from; e < to; e++) {
        if (parts[e].gain || parts[e].bias || (parts[e].rank && !parts[e].A)) return false;
        pairs += (parts[e].rank + 1) / 2;
    }
    return layer.in % 32 == 0 && layer.out % 32 == 0;
}

// y: of the layers one after the other, each (tokens, out).
static void linear(const Layer* layers, int64_t count, const bf16* x, int64_t x_token, int64_t tokens, bf16* y,
                   const Adapters& adapters) {
    static thread_local Stretches early, late;  // of the thread that starts the others
    static thread_local std::vector<bf16> products;
    static thread_local std::vector<int64_t> begins, places;
    static thread_local Bytes inputs;
    const int64_t tiles = adapters.tiles * count;
    begins.assign(count + 1, 0);
    for (int64_t l = 0; l < count; l++)
        begins[l + 1] = begins[l] + (layers[l].kind == READY ? 0 : (layers[l].out + PANEL - 1) / PANEL);
    places.assign(tiles + 1, 0);  // where the product A x of a tile and layer lies; the same as the next one's: it has none
    for (int64_t n = 0; n < tiles; n++) {
        int64_t from, to, pairs;
        adapters.span(n / count, from, to);
        if (!plain(layers[n % count], adapters.of(layers[n % count]), from, to, pairs)) pairs = 0;
        places[n + 1] = places[n] + pairs * TOGETHER * 2;
    }
    if (int64_t(products.size()) < places[tiles]) products.resize(places[tiles]);
    memset(products.data(), 0, places[tiles] * sizeof(bf16));
    const int64_t threads = omp_get_max_threads(), panels = begins[count];
    early.set(panels + tiles, threads);
    late.set(tiles, threads);
    Stretches &first = early, &second = late;  // thread_local names would be each thread's own below
    Bytes& bytes = inputs;
    const bool blocked = layers[0].kind == Q8_0 || layers[0].kind == Q4_0;
    if (blocked) {
        bytes.room(tokens, layers[0].in);
        if (tokens < TOGETHER)
            for (int64_t t = 0; t < tokens; t++) bytes.set(x + t * x_token, t, layers[0].in);
    }
    bf16* h = products.data();
    const int64_t *begin = begins.data(), *at = places.data();
    const auto output = [&](int64_t l) {
        bf16* own = y;
        for (int64_t i = 0; i < l; i++) own += tokens * layers[i].out;
        return own;
    };
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num();
        if (blocked && tokens >= TOGETHER) {
#pragma omp for
            for (int64_t t = 0; t < tokens; t++) bytes.set(x + t * x_token, t, layers[0].in);
        }
        first.run(thread, [&](int64_t n) {
            if (n < panels) {
                int64_t l = 0;
                while (n >= begin[l + 1]) l++;
                multiply_panel(layers[l], n - begin[l], x, x_token, output(l), tokens, bytes);
                return;
            }
            n -= panels;
            if (at[n] == at[n + 1]) return;
            const Layer& layer = layers[n % count];
            const Part* parts = adapters.of(layer);
            const int32_t *own = adapters.order + adapters.tile[n / count];
            const int64_t size = adapters.tile[n / count + 1] - adapters.tile[n / count];
            const bf16* rows[TOGETHER];
            for (int64_t t = 0; t < size; t++) rows[t] = x + own[t] * x_token;
            int64_t from, to;
            adapters.span(n / count, from, to);
            bf16* result = h + at[n];
            for (int64_t e = from; e < to; e++) {
                if (!parts[e].rank) continue;
                project_entry(parts[e], rows, size, layer.in, adapters.weight[e], result);
                result += (parts[e].rank + 1) / 2 * TOGETHER * 2;
            }
        });
        if (tiles) {
#pragma omp barrier
            std::vector<float> memory;
            second.run(thread, [&](int64_t n) {
                const Layer& layer = layers[n % count];
                const Part* parts = adapters.of(layer);
                const int32_t *own = adapters.order + adapters.tile[n / count];
                const int64_t size = adapters.tile[n / count + 1] - adapters.tile[n / count];
                bf16 *rows[TOGETHER], *result = output(n % count);
                for (int64_t t = 0; t < size; t++) rows[t] = result + own[t] * layer.out;
                int64_t from, to;
                adapters.span(n / count, from, to);
                if (at[n] != at[n + 1])
                    expand_some<TOGETHER>(size, parts, from, to, h + at[n], rows, layer.out);
                else
                    for (int64_t t = 0; t < size; t++)
                        adapt_token(x + own[t] * x_token, rows[t], layer.in, layer.out, parts, from, to, adapters.weight, memory);
            });
        }
    }
}

extern "C" __attribute__((visibility("default"))) void linear_bfloat16(
    const Layer* layers, int64_t count, const bf16* x, int64_t x_token, int64_t tokens, bf16* y, const Part* parts,
    int64_t entries, const int32_t* row, const int32_t* start, const float* weight, const int32_t* order, const int32_t* tile,
    int64_t tiles) {
    linear(layers, count, x, x_token, tokens, y, Adapters{parts, entries, row, start, weight, order, tile, tiles});
}

#endif
