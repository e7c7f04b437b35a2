// Sixteen floats as one vector, and the numbers of a tensor to and from them: what all compiled loops are written in.
// GCC's and Clang's vector types become whatever the processor has; where a compiler does not find the way to an
// instruction that matters, it is named.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef float v16_anywhere __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t bf16;

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline void narrow(float x, float* to) { *to = x; }
static inline void narrow(float x, bf16* to) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = x != x ? 0x7fc0 : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
static inline v16 load(const float* p) { return *reinterpret_cast<const v16_anywhere*>(p); }
static inline v16 load(const bf16* p) {
#if defined(__AVX512F__)  // what the portable form below should become, and does not with every compiler
    return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
    typedef uint32_t u16 __attribute__((vector_size(64)));
    u16 bits = __builtin_convertvector(*reinterpret_cast<const h16*>(p), u16) << 16;
    return (v16)bits;
#endif
}
static inline void fetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}
static inline void keep(v16 x, float* to) { *reinterpret_cast<v16_anywhere*>(to) = x; }
static inline void keep(v16 x, bf16* to) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &h, 32);
#else
    for (int i = 0; i < 16; i++) narrow(x[i], to + i);
#endif
}
static inline float sum(v16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
#endif
}
template <typename T>
static inline void widen_all(const T* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) keep(load(from + i), to + i);
    for (; i < count; i++) to[i] = widen(from[i]);
}
template <typename T>
static inline void narrow_all(const float* from, T* to, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) keep(load(from + i), to + i);
    for (; i < count; i++) narrow(from[i], to + i);
}
static inline v16 all(float x) { return x - v16{}; }

// e^x to a rounding or two of float32: 2^n times a polynomial on [-ln2/2, ln2/2].
static inline v16 exponential(v16 x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    v16 n = x * 1.44269504088896341f;
    i16 whole = __builtin_convertvector(n + (n < 0 ? all(-0.5f) : all(0.5f)), i16);
    v16 k = __builtin_convertvector(whole, v16);
    v16 r = x - k * 0.693359375f + k * 2.12194440e-4f;
    v16 p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16 power = (whole + 127) << 23;
    return p * (v16)power;
}
