// Products with weights in llama.cpp's blocks (core/storage/blocks.py): 32 inputs of an output share a scale.
//
// Inputs become signed bytes, 32 of a token with a scale too. A block's sum of products of bytes is exact in 32 bits, and the
// blocks are added in their order, so that a token's outputs do not depend on how many tokens are computed with it.
//
// A weight lies in panels of 48 outputs, of each block three sixteenths of the outputs, one after the other:
//     16 scales in half precision; then bytes of q + 128 (q8_0: eight times 16 outputs of four inputs) or
//     of q in four bits (q4_0: four times; inputs 4 i to 4 i + 3 in the low halves, 16 + 4 i to 16 + 4 i + 3 in the high ones)
#pragma once

#include "vector.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)

constexpr int64_t BLOCK = 32;

// READY: the product is there already, and the adapters alone are added to it.
enum Kind : int64_t { PLAIN = 0, READY = 1, Q8_0 = 8, Q4_0 = 4 };

// Bytes of 16 outputs of a block.
template <int K>
constexpr int64_t sixteen = 32 + 64 * K;

// What is multiplied: bytes (tokens, in), and per block of a token its scale and the sum of its bytes.
struct Bytes {
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> sums;
    void room(int64_t tokens, int64_t in) {
        const size_t blocks = tokens * in / BLOCK;
        if (codes.size() < blocks * BLOCK) codes.resize(blocks * BLOCK), scales.resize(blocks), sums.resize(blocks);
    }
    // One token, x (in,). A block with a NaN or an infinity gets NaN as its scale.
    void set(const bf16* x, int64_t token, int64_t in) {
        const int64_t blocks = in / BLOCK;
        for (int64_t b = 0; b < blocks; b++) {
            const __m512 low = (__m512)load(x + b * BLOCK), high = (__m512)load(x + b * BLOCK + 16);
            const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            const float nothing = 0 * _mm512_reduce_add_ps(_mm512_add_ps(_mm512_mul_ps(low, _mm512_set1_ps(0x1p-64f)),
                                                                         _mm512_mul_ps(high, _mm512_set1_ps(0x1p-64f))));
            const float scale = largest / 127, times = scale > 0 ? 1 / scale : 0;
            const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, _mm512_set1_ps(times)));
            const __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(high, _mm512_set1_ps(times)));
            int8_t* to = codes.data() + token * in + b * BLOCK;
            _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8(a));
            _mm_storeu_si128((__m128i*)(to + 16), _mm512_cvtsepi32_epi8(c));
            scales[token * blocks + b] = scale + nothing;
            sums[token * blocks + b] = _mm512_reduce_add_epi32(_mm512_add_epi32(a, c));
        }
    }
};

// y (R tokens from `first` on, up to 48 columns) = bias + x times a panel
template <int K, int R>
static inline void multiply_blocks(const Bytes& x, int64_t first, const uint8_t* panel, int64_t in, const float* bias, bf16* y,
                                   int64_t y_token, int64_t columns) {
    constexpr int S = R > 2 ? 1 : 2;  // sums side by side, where there are too few to keep the processor busy
    constexpr int32_t offset = K == 8 ? -128 : -8;
    const int64_t blocks = in / BLOCK;
    const int8_t* codes = x.codes.data() + first * in;
    const float* scales = x.scales.data() + first * blocks;
    const int32_t* sums = x.sums.data() + first * blocks;
    __m512 c[R][3];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 3; j++) c[r][j] = _mm512_loadu_ps(bias + 16 * j);
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* w = panel + b * 3 * sixteen<K>;
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) {
            const uint8_t* own = w + j * sixteen<K>;
            for (int i = 0; i < sixteen<K>; i += 64) __builtin_prefetch(own + 3 * sixteen<K> + i);
            const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)own));
            __m512i d[R][S];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                d[r][0] = _mm512_set1_epi32(offset * sums[r * blocks + b]);
                if (S > 1) d[r][S - 1] = _mm512_setzero_si512();
            }
            const auto add = [&](const __m512i q, int g) {
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    int32_t four;
                    memcpy(&four, codes + r * in + b * BLOCK + 4 * g, 4);
                    d[r][g % S] = _mm512_dpbusd_epi32(d[r][g % S], q, _mm512_set1_epi32(four));
                }
            };
            if (K == 8) {
#pragma GCC unroll 8
                for (int g = 0; g < 8; g++) add(_mm512_loadu_si512(own + 32 + 64 * g), g);
            } else {
                const __m512i half = _mm512_set1_epi8(15);
#pragma GCC unroll 4
                for (int g = 0; g < 4; g++) {
                    const __m512i both = _mm512_loadu_si512(own + 32 + 64 * g);
                    add(_mm512_and_si512(both, half), g);
                    add(_mm512_and_si512(_mm512_srli_epi16(both, 4), half), g + 4);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512i total = S > 1 ? _mm512_add_epi32(d[r][0], d[r][S - 1]) : d[r][0];
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(scales[r * blocks + b]));
                c[r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, c[r][j]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 3 && columns > 16 * j; j++) {
            const int64_t left = columns - 16 * j;
            const __mmask16 mask = left >= 16 ? 0xffff : (1 << left) - 1;
            _mm256_mask_storeu_epi16(y + r * y_token + 16 * j, mask, (__m256i)_mm512_cvtneps_pbh(c[r][j]));
        }
}

template <int K, int R>
static void multiply_blocks_rest(int64_t rows, const Bytes& x, int64_t first, const uint8_t* panel, int64_t in,
                                 const float* bias, bf16* y, int64_t y_token, int64_t columns) {
    if (rows == R)
        multiply_blocks<K, R>(x, first, panel, in, bias, y, y_token, columns);
    else if constexpr (R > 1)
        multiply_blocks_rest<K, R - 1>(rows, x, first, panel, in, bias, y, y_token, columns);
}

template <int K>
static void multiply_blocked_panel(const Bytes& x, const uint8_t* panel, int64_t in, const float* bias, bf16* y,
                                   int64_t y_token, int64_t columns, int64_t tokens) {
    constexpr int ROWS_OF_BLOCKS = 6;
    int64_t t = 0;
    for (; t + ROWS_OF_BLOCKS <= tokens; t += ROWS_OF_BLOCKS)
        multiply_blocks<K, ROWS_OF_BLOCKS>(x, t, panel, in, bias, y + t * y_token, y_token, columns);
    multiply_blocks_rest<K, ROWS_OF_BLOCKS - 1>(tokens - t, x, t, panel, in, bias, y + t * y_token, y_token, columns);
}

#endif
