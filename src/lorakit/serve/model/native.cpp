// The inner loops of a serving step on a processor: attention over pages of keys and values, the adapters' product and
// the likeliest token; linear layers are in linear.cpp, elementwise operations in native/elementwise.cpp. Each does what its
// namesake in Python does (product.py, attention.py), which the tests hold it to; numbers are added up in float32. Compiled at
// first use for this machine by native.py.
//
// Sixteen floats are one vector: a page holds sixteen tokens, keys with the tokens innermost, so that a page's scores are one
// vector and need no sums across lanes.

#include <omp.h>

#include "adapters.h"

constexpr int PAGE = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Attention

constexpr int TILE = 4;  // tokens of one row that read a page together

template <typename T>
static void attend(const T* q, int64_t q_head, int64_t q_token, const T* k, int64_t k_head, int64_t k_token, const T* v,
                   int64_t v_head, int64_t v_token, T* out, T* keys, T* values, const int32_t* table, int64_t table_width,
                   const int32_t* row, const int32_t* position, int64_t tokens, const int32_t* tiles, int64_t tile_count,
                   int64_t heads, int64_t key_heads, int64_t d, int64_t dv, float scale, float softcap, int64_t window,
                   const float* sinks) {
    const int64_t group = heads / key_heads, dv_pad = (dv + 15) / 16 * 16, queries = TILE * group;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t page = table[row[t] * table_width + position[t] / PAGE], slot = position[t] % PAGE;
            for (int64_t h = 0; h < key_heads; h++) {
                T* to = keys + (page * key_heads + h) * d * PAGE + slot;
                const T* from = k + h * k_head + t * k_token;
                for (int64_t i = 0; i < d; i++) to[i * PAGE] = from[i];
                memcpy(values + ((page * key_heads + h) * PAGE + slot) * dv, v + h * v_head + t * v_token, dv * sizeof(T));
            }
        }
        std::vector<float> memory;
#pragma omp for schedule(dynamic, 2)
        for (int64_t task = 0; task < tile_count * key_heads; task++) {
            const int64_t first = tiles[2 * (task / key_heads)], count = tiles[2 * (task / key_heads) + 1];
            const int64_t h = task % key_heads, used = count * group;
            const int32_t* pages = table + row[first] * table_width;
            const int64_t last = position[first] + count - 1;
            int64_t start = window > 0 ? position[first] - window + 1 : 0;
            start = start < 0 ? 0 : start / PAGE * PAGE;
            const int64_t length = (last - start) / PAGE * PAGE + PAGE;
            memory.resize(queries * (d + length + dv_pad) + 16 * (d + dv_pad));
            float *wide = memory.data(), *scores = wide + queries * d, *result = scores + queries * length;
            float *page_buffer = result + queries * dv_pad;
            for (int64_t i = 0; i < count; i++)
                for (int64_t g = 0; g < group; g++) {
                    const T* from = q + (h * group + g) * q_head + (first + i) * q_token;
                    for (int64_t c = 0; c < d; c++) wide[(i * group + g) * d + c] = widen(from[c]) * scale;
                }
            for (int64_t s = 0; s < length; s += PAGE) {
                const T* page = keys + (pages[(start + s) / PAGE] * key_heads + h) * d * PAGE;
                // The pages lie anywhere in memory, so the processor cannot guess what comes next.
                if (s + PAGE < length)
                    fetch(keys + (pages[(start + s) / PAGE + 1] * key_heads + h) * d * PAGE, d * PAGE * sizeof(T));
                fetch(values + (pages[(start + s) / PAGE] * key_heads + h) * PAGE * dv, PAGE * dv * sizeof(T));
                for (int64_t c = 0; c < d; c++) keep(load(page + c * PAGE), page_buffer + c * PAGE);
                int64_t n = 0;
                for (; n + 3 <= used; n += 3) {
                    const float *q0 = wide + n * d, *q1 = q0 + d, *q2 = q1 + d;
                    v16 a0{}, a1{}, a2{}, b0{}, b1{}, b2{};
                    int64_t c = 0;
                    for (; c + 2 <= d; c += 2) {
                        v16 x = load(page_buffer + c * PAGE), y = load(page_buffer + (c + 1) * PAGE);
                        a0 += q0[c] * x, a1 += q1[c] * x, a2 += q2[c] * x;
                        b0 += q0[c + 1] * y, b1 += q1[c + 1] * y, b2 += q2[c + 1] * y;
                    }
                    for (; c < d; c++) {
                        v16 x = load(page_buffer + c * PAGE);
                        a0 += q0[c] * x, a1 += q1[c] * x, a2 += q2[c] * x;
                    }
                    keep(a0 + b0, scores + n * length + s);
                    keep(a1 + b1, scores + (n + 1) * length + s);
                    keep(a2 + b2, scores + (n + 2) * length + s);
                }
                for (; n < used; n++) {
                    const float* q0 = wide + n * d;
                    v16 a0{}, b0{};
                    int64_t c = 0;
                    for (; c + 2 <= d; c += 2) {
                        a0 += q0[c] * load(page_buffer + c * PAGE);
                        b0 += q0[c + 1] * load(page_buffer + (c + 1) * PAGE);
                    }
                    for (; c < d; c++) a0 += q0[c] * load(page_buffer + c * PAGE);
                    keep(a0 + b0, scores + n * length + s);
                }
            }
            for (int64_t n = 0; n < used; n++) {
                float* own = scores + n * length;
                const int64_t here = position[first] + n / group;
                const int64_t low = window > 0 && here - window + 1 > start ? here - window + 1 - start : 0;
                const int64_t high = here - start + 1;
                if (softcap > 0)
                    for (int64_t j = low; j < high; j++) own[j] = softcap * std::tanh(own[j] / softcap);
                for (int64_t j = 0; j < low; j++) own[j] = -INFINITY;
                for (int64_t j = high; j < length; j++) own[j] = -INFINITY;  // whatever it was
                v16 tops = all(-INFINITY);
                for (int64_t j = 0; j < length; j += 16) tops = load(own + j) > tops ? load(own + j) : tops;
                float top = sinks ? sinks[h * group + n % group] : -INFINITY;
                for (int i = 0; i < 16; i++) top = tops[i] > top ? tops[i] : top;
                v16 total{};
                for (int64_t j = 0; j < length; j += 16) {
                    v16 x = load(own + j);
                    v16 p = x == -INFINITY ? v16{} : exponential(x - top);
                    total += p;
                    keep(p, own + j);
                }
                float share = sum(total);
                if (sinks) share += std::exp(sinks[h * group + n % group] - top);
                share = 1.0f / share;
                for (int64_t j = 0; j < length; j += 16) keep(load(own + j) * share, own + j);
            }
            memset(result, 0, queries * dv_pad * sizeof(float));
            for (int64_t s = 0; s < length; s += PAGE) {
                const T* page = values + (pages[(start + s) / PAGE] * key_heads + h) * PAGE * dv;
                for (int64_t j = 0; j < PAGE; j++) {
                    float* to = page_buffer + j * dv_pad;
                    int64_t c = 0;
                    for (; c + 16 <= dv; c += 16) keep(load(page + j * dv + c), to + c);
                    for (; c < dv_pad; c++) to[c] = c < dv ? widen(page[j * dv + c]) : 0.0f;
                }
                for (int64_t n = 0; n < used; n++) {
                    // Only what the query sees: behind it may lie anything, and zero times anything is not always zero.
                    const int64_t seen = position[first] + n / group + 1 - start - s, end = seen < PAGE ? seen : PAGE;
                    const float* p = scores + n * length + s;
                    for (int64_t c = 0; c < dv_pad; c += 64) {
                        const int64_t vectors = dv_pad - c >= 64 ? 4 : (dv_pad - c) / 16;
                        float* to = result + n * dv_pad + c;
                        if (vectors == 4) {
                            v16 a = load(to), b = load(to + 16), e = load(to + 32), f = load(to + 48);
                            for (int64_t j = 0; j < end; j++) {
                                const float* from = page_buffer + j * dv_pad + c;
                                a += p[j] * load(from), b += p[j] * load(from + 16);
                                e += p[j] * load(from + 32), f += p[j] * load(from + 48);
                            }
                            keep(a, to), keep(b, to + 16), keep(e, to + 32), keep(f, to + 48);
                        } else {
                            for (int64_t i = 0; i < vectors; i++) {
                                v16 a = load(to + 16 * i);
                                for (int64_t j = 0; j < end; j++) a += p[j] * load(page_buffer + j * dv_pad + c + 16 * i);
                                keep(a, to + 16 * i);
                            }
                        }
                    }
                }
            }
            for (int64_t n = 0; n < used; n++) {
                T* to = out + ((first + n / group) * heads + h * group + n % group) * dv;
                narrow_all(result + n * dv_pad, to, dv);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The adapters' product for many tokens

template <typename T>
static void adapt(const T* x, int64_t x_token, T* y, int64_t y_token, int64_t in, int64_t out, const Part* parts,
                  const int32_t* row, const int32_t* start, const float* weight, int64_t tokens) {
#pragma omp parallel if (tokens > 1)
    {
        std::vector<float> memory;
#pragma omp for schedule(dynamic, 4)
        for (int64_t t = 0; t < tokens; t++)
            if (row[t] >= 0)  // else a token whose adapters go another way
                adapt_token(x + t * x_token, y + t * y_token, in, out, parts, start[row[t]], start[row[t] + 1], weight, memory);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling

// The first of the largest entries of each row.
template <typename T>
static void greatest(const T* x, int64_t* index, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        const T* from = x + t * width;
        v16 tops = all(-INFINITY);
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) tops = load(from + i) > tops ? load(from + i) : tops;
        float top = -INFINITY;
        for (int j = 0; j < 16; j++) top = tops[j] > top ? tops[j] : top;
        for (; i < width; i++) top = widen(from[i]) > top ? widen(from[i]) : top;
        for (i = 0; i < width && widen(from[i]) != top; i++) {}
        index[t] = i < width ? i : 0;
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))
#define BOTH(name, arguments, call)                                     \
    EXPORT void name##_float32 arguments(float) { name<float> call; }   \
    EXPORT void name##_bfloat16 arguments(bf16) { name<bf16> call; }

// As long as all threads of OpenMP together are no more than the processors, those that wait for work look for it for a while
// before they sleep; waking them costs more than most of the loops above. Every thread that has ever shared out work keeps
// helpers of its own, so those that serve nobody are let go, and who reads adapters has none.
extern "C" int omp_pause_resource_all(omp_pause_resource_t) __attribute__((weak));
EXPORT void alone() { omp_set_num_threads(1); }
EXPORT void let_go() {
    if (omp_pause_resource_all) omp_pause_resource_all(omp_pause_soft);
}

#define ATTEND(T)                                                                                                          \
    (const T* q, int64_t q_head, int64_t q_token, const T* k, int64_t k_head, int64_t k_token, const T* v, int64_t v_head, \
     int64_t v_token, T* out, T* keys, T* values, const int32_t* table, int64_t table_width, const int32_t* row,           \
     const int32_t* position, int64_t tokens, const int32_t* tiles, int64_t tile_count, int64_t heads, int64_t key_heads,  \
     int64_t d, int64_t dv, float scale, float softcap, int64_t window, const float* sinks)
BOTH(attend, ATTEND,
     (q, q_head, q_token, k, k_head, k_token, v, v_head, v_token, out, keys, values, table, table_width, row, position,
      tokens, tiles, tile_count, heads, key_heads, d, dv, scale, softcap, window, sinks))

#define ADAPT(T)                                                                                               \
    (const T* x, int64_t x_token, T* y, int64_t y_token, int64_t in, int64_t out, const Part* parts,           \
     const int32_t* row, const int32_t* start, const float* weight, int64_t tokens)
BOTH(adapt, ADAPT, (x, x_token, y, y_token, in, out, parts, row, start, weight, tokens))

#define GREATEST(T) (const T* x, int64_t* index, int64_t rows, int64_t width)
BOTH(greatest, GREATEST, (x, index, rows, width))
