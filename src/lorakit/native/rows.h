// Rows of functions of one pass, for those that go over many: RMSNorm and rotary positions.
#pragma once

#include "vector.h"

// A vector as it is after a stop in T.
static inline v16 rounded(v16 x, const float*) { return x; }
static inline v16 rounded(v16 x, const bf16*) {
    bf16 short_form[16];
    keep(x, short_form);
    return load(short_form);
}

// x (width) -> y; `shift` is added to the weight (Gemma's 1). Returns 1 / root mean square.
template <typename T>
static inline float norm_row(const T* x, const T* weight, T* y, int64_t width, float eps, float shift) {
    v16 squares{};
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < width; i++) total += widen(x[i]) * widen(x[i]);
    const float scale = 1.0f / std::sqrt(total / width + eps);
    for (i = 0; i + 16 <= width; i += 16) {
        const v16 unit = load(x + i) * scale, factor = load(weight + i);
        // Without a shift models round before they multiply.
        keep(shift != 0 ? unit * (factor + shift) : rounded(unit, x) * factor, y + i);
    }
    for (; i < width; i++) {
        if (shift != 0) {
            narrow(widen(x[i]) * scale * (widen(weight[i]) + shift), y + i);
        } else {
            T unit;
            narrow(widen(x[i]) * scale, &unit);
            narrow(widen(unit) * widen(weight[i]), y + i);
        }
    }
    return scale;
}

// One head of one token, x (d), turned by angles (d), or by the transpose of that turn (`Back`), for any angles.
template <bool Back, typename T>
static inline void turn_head(const T* x, const T* cosine, const T* sine, T* y, int64_t d) {
    const int64_t half = d / 2;
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const v16 a = load(x + i), b = load(x + i + half), s = load(sine + i), s2 = load(sine + i + half);
        keep(a * load(cosine + i) - b * (Back ? -s2 : s), y + i);
        keep(b * load(cosine + i + half) + a * (Back ? -s : s2), y + i + half);
    }
    for (; i < half; i++) {
        const float a = widen(x[i]), b = widen(x[i + half]), s = widen(sine[i]), s2 = widen(sine[i + half]);
        narrow(a * widen(cosine[i]) - b * (Back ? -s2 : s), y + i);
        narrow(b * widen(cosine[i + half]) + a * (Back ? -s : s2), y + i + half);
    }
}
