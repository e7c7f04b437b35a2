// The adapters' product for one token: y += sum over its adapters of weight * ((gain - 1) * y + bias + B A x)

#pragma once
#include "vector.h"

// What one adapter says about one layer: addresses (0 where there is none) of A (rank, in), B (rank, out), gain and bias (out,).
struct Part {
    int64_t A, B, gain, bias, rank;
};

static inline void dots(const float* A, const float* x, int64_t rank, int64_t in, float* h) {
    for (int64_t r = 0; r < rank; r++) {
        const float* a = A + r * in;
        v16 s0{}, s1{};
        int64_t i = 0;
        for (; i + 32 <= in; i += 32) s0 += load(a + i) * load(x + i), s1 += load(a + i + 16) * load(x + i + 16);
        float rest = 0;
        for (; i < in; i++) rest += a[i] * x[i];
        h[r] = sum(s0 + s1) + rest;
    }
}

static inline void dots(const bf16* A, const bf16* x, int64_t rank, int64_t in, float* h) {
    int64_t r = 0;
#if defined(__AVX512BF16__)
    for (; r + 4 <= rank && in % 32 == 0; r += 4) {
        const bf16 *a0 = A + r * in, *a1 = a0 + in, *a2 = a1 + in, *a3 = a2 + in;
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t i = 0; i < in; i += 32) {
            __m512bh b = (__m512bh)_mm512_loadu_si512(x + i);
            s0 = _mm512_dpbf16_ps(s0, (__m512bh)_mm512_loadu_si512(a0 + i), b);
            s1 = _mm512_dpbf16_ps(s1, (__m512bh)_mm512_loadu_si512(a1 + i), b);
            s2 = _mm512_dpbf16_ps(s2, (__m512bh)_mm512_loadu_si512(a2 + i), b);
            s3 = _mm512_dpbf16_ps(s3, (__m512bh)_mm512_loadu_si512(a3 + i), b);
        }
        h[r] = _mm512_reduce_add_ps(s0), h[r + 1] = _mm512_reduce_add_ps(s1);
        h[r + 2] = _mm512_reduce_add_ps(s2), h[r + 3] = _mm512_reduce_add_ps(s3);
    }
#endif
    for (; r < rank; r++) {
        const bf16* a = A + r * in;
        v16 s0{}, s1{};
        int64_t i = 0;
        for (; i + 32 <= in; i += 32) s0 += load(a + i) * load(x + i), s1 += load(a + i + 16) * load(x + i + 16);
        float rest = 0;
        for (; i < in; i++) rest += widen(a[i]) * widen(x[i]);
        h[r] = sum(s0 + s1) + rest;
    }
}

// acc[out] += h[rank] B[rank, out]
template <typename T>
static inline void spread(const T* B, const float* h, int64_t rank, int64_t out, float* acc) {
    int64_t o = 0;
    for (; o + 64 <= out; o += 64) {
        v16 a = load(acc + o), b = load(acc + o + 16), c = load(acc + o + 32), d = load(acc + o + 48);
        for (int64_t r = 0; r < rank; r++) {
            const T* from = B + r * out + o;
            a += h[r] * load(from), b += h[r] * load(from + 16);
            c += h[r] * load(from + 32), d += h[r] * load(from + 48);
        }
        keep(a, acc + o), keep(b, acc + o + 16), keep(c, acc + o + 32), keep(d, acc + o + 48);
    }
    for (; o < out; o++) {
        float a = acc[o];
        for (int64_t r = 0; r < rank; r++) a += h[r] * widen(B[r * out + o]);
        acc[o] = a;
    }
}

// One token's adapters, entries `from` to `to`: any rank, gain, bias, dense changes. `memory` is the thread's own.
template <typename T>
static void adapt_token(const T* x, T* own, int64_t in, int64_t out, const Part* parts, int64_t from, int64_t to,
                        const float* weight, std::vector<float>& memory) {
    bool any = false;
    int64_t most = 0;
    for (int64_t e = from; e < to; e++) {
        any |= parts[e].rank || parts[e].gain || parts[e].bias;
        most = parts[e].rank > most ? parts[e].rank : most;
    }
    if (!any) return;
    memory.resize(out + most);
    float *acc = memory.data(), *h = acc + out;
    widen_all(own, acc, out);
    for (int64_t e = from; e < to; e++) {
        const Part& part = parts[e];
        const float w = weight[e];
        if (part.gain) {
            const T* gain = reinterpret_cast<const T*>(part.gain);
            for (int64_t o = 0; o < out; o++) acc[o] += w * (widen(gain[o]) * widen(own[o]));
        }
        if (part.bias) {
            const T* bias = reinterpret_cast<const T*>(part.bias);
            for (int64_t o = 0; o < out; o++) acc[o] += w * widen(bias[o]);
        }
        if (part.rank) {
            if (part.A)
                dots(reinterpret_cast<const T*>(part.A), x, part.rank, in, h);
            else  // a dense change: B is the transposed matrix itself
                for (int64_t i = 0; i < in; i++) h[i] = widen(x[i]);
            for (int64_t r = 0; r < part.rank; r++) h[r] *= w;
            spread(reinterpret_cast<const T*>(part.B), h, part.rank, out, acc);
        }
    }
    narrow_all(acc, own, out);
}
