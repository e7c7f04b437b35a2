// Elementwise operations and their derivatives, on a processor: RMSNorm, gated activations, rotary positions. Each does what its
// namesake in elementwise.py does, which the tests hold it to; numbers are added up in float32. Compiled at first use for this
// machine. Tensors are contiguous; the widths of derivatives are multiples of 16.

#include "vector.h"

typedef int64_t integer;

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

constexpr integer ALONE = 1 << 16;  // numbers that one thread is through with before others would have begun

// x (rows, width) -> y, and 1 / root mean square of each row where `scales` is asked for. `shift` is added to the weight.
template <typename T>
static void norm(const T* x, const T* weight, T* y, float* scales, integer rows, integer width, float eps, float shift) {
#pragma omp parallel for schedule(static) if (rows * width > ALONE)
    for (integer t = 0; t < rows; t++) {
        const float scale = norm_row(x + t * width, weight, y + t * width, width, eps, shift);
        if (scales) scales[t] = scale;
    }
}

template <typename T>
static void norm_backward(const T* dy, const T* x, const T* weight, const float* scales, T* dx, integer rows, integer width,
                          float shift) {
#pragma omp parallel for schedule(static)
    for (integer t = 0; t < rows; t++) {
        const T *slope = dy + t * width, *from = x + t * width;
        const float scale = scales[t];
        v16 products{};
        for (integer i = 0; i < width; i += 16)
            products += load(slope + i) * (load(weight + i) + shift) * (load(from + i) * scale);
        const float mean = sum(products) / width;
        for (integer i = 0; i < width; i += 16)
            keep(scale * (load(slope + i) * (load(weight + i) + shift) - load(from + i) * scale * mean), dx + t * width + i);
    }
}

// act(gate) * up over `count` numbers; `tanh`: GELU in its tanh form, else SiLU.
constexpr float SLOPE = 0.7978845608028654f, CUBE = 0.044715f;  // the square root of 2 / pi

static inline v16 hyperbolic(v16 gate) {
    return 1.0f - 2.0f / (1.0f + exponential(2.0f * SLOPE * (gate + CUBE * gate * gate * gate)));
}

template <typename T>
static void gate(const T* gates, const T* up, T* y, integer count, integer tanh) {
    const auto sixteen = [tanh](const T* gates, const T* up, T* y) {
        const v16 g = load(gates);
        const v16 act = tanh ? 0.5f * g * (1.0f + hyperbolic(g)) : g / (1.0f + exponential(-g));
        keep(rounded(act, gates) * load(up), y);  // models round before they multiply
    };
#pragma omp parallel for schedule(static) if (count > ALONE)
    for (integer i = 0; i < count / 16; i++) sixteen(gates + 16 * i, up + 16 * i, y + 16 * i);
    if (const integer left = count % 16) {
        T g[16]{}, u[16]{}, product[16];
        memcpy(g, gates + count - left, left * sizeof(T));
        memcpy(u, up + count - left, left * sizeof(T));
        sixteen(g, u, product);
        memcpy(y + count - left, product, left * sizeof(T));
    }
}

template <typename T>
static void gate_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, integer count, integer tanh) {
#pragma omp parallel for schedule(static)
    for (integer i = 0; i < count; i += 16) {
        const v16 slope = load(dy + i), g = load(gate + i);
        v16 act, derivative;
        if (tanh) {
            const v16 t = hyperbolic(g);
            act = 0.5f * g * (1.0f + t);
            derivative = 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * SLOPE * (1.0f + 3.0f * CUBE * g * g);
        } else {
            const v16 sigmoid = 1.0f / (1.0f + exponential(-g));
            act = g * sigmoid;
            derivative = sigmoid * (1.0f + g * (1.0f - sigmoid));
        }
        keep(slope * load(up + i) * derivative, dgate + i);
        keep(slope * act, dup + i);
    }
}

// Heads of tokens, each d numbers of x, turned by angles (tokens, d), or by the transpose of that; y is (tokens, heads, d).
template <bool Back, typename T>
static void turn(const T* x, integer x_head, integer x_token, const T* cosine, const T* sine, T* y, integer heads,
                 integer tokens, integer d) {
#pragma omp parallel for schedule(static) if (tokens * heads * d > ALONE)
    for (integer t = 0; t < tokens; t++)
        for (integer h = 0; h < heads; h++)
            turn_head<Back>(x + h * x_head + t * x_token, cosine + t * d, sine + t * d, y + (t * heads + h) * d, d);
}

// dy, y (rows, width), g (width) -> dy * g and the gradient of g, the sum over rows of dy * y. Each worker adds up the rows of its
// own stretch, and the stretches are added in their order.
template <typename T>
static void gain_backward(const T* dy, const T* y, const float* g, T* of_y, float* of_g, integer rows, integer width,
                          integer workers) {
    std::vector<float> sums(workers * width, 0.0f);
#pragma omp parallel for schedule(static, 1) num_threads(int(workers))
    for (integer who = 0; who < workers; who++) {
        float* own = sums.data() + who * width;
        for (integer t = rows * who / workers; t < rows * (who + 1) / workers; t++)
            for (integer i = 0; i < width; i += 16) {
                const v16 slope = load(dy + t * width + i);
                keep(slope * load(g + i), of_y + t * width + i);
                keep(load(own + i) + slope * load(y + t * width + i), own + i);
            }
    }
    for (integer i = 0; i < width; i += 16) {
        v16 total{};
        for (integer who = 0; who < workers; who++) total += load(sums.data() + who * width + i);
        keep(total, of_g + i);
    }
}

#define BOTH(name, arguments, call)                               \
    extern "C" void name##_float32 arguments(float) { call; }     \
    extern "C" void name##_bfloat16 arguments(bf16) { call; }

#define NORM(T) (const T* x, const T* weight, T* y, float* scales, integer rows, integer width, float eps, float shift)
BOTH(norm, NORM, norm(x, weight, y, scales, rows, width, eps, shift))
#define NORM_BACKWARD(T) \
    (const T* dy, const T* x, const T* weight, const float* scales, T* dx, integer rows, integer width, float shift)
BOTH(norm_backward, NORM_BACKWARD, norm_backward(dy, x, weight, scales, dx, rows, width, shift))
#define GATE(T) (const T* gates, const T* up, T* y, integer count, integer tanh)
BOTH(gate, GATE, gate(gates, up, y, count, tanh))
#define GATE_BACKWARD(T) (const T* dy, const T* gates, const T* up, T* dgate, T* dup, integer count, integer tanh)
BOTH(gate_backward, GATE_BACKWARD, gate_backward(dy, gates, up, dgate, dup, count, tanh))
#define TURN(T)                                                                                                          \
    (const T* x, integer x_head, integer x_token, const T* cosine, const T* sine, T* y, integer heads, integer tokens, \
     integer d, integer back)
BOTH(turn, TURN, back ? turn<true>(x, x_head, x_token, cosine, sine, y, heads, tokens, d)
                      : turn<false>(x, x_head, x_token, cosine, sine, y, heads, tokens, d))
#define GAIN_BACKWARD(T) \
    (const T* dy, const T* y, const float* g, T* of_y, float* of_g, integer rows, integer width, integer workers)
BOTH(gain_backward, GAIN_BACKWARD, gain_backward(dy, y, g, of_y, of_g, rows, width, workers))
