// Functions of one pass over memory and their derivatives, on a processor: RMSNorm, gated activations, rotary positions. Each
// does what its namesake in fusion.py does, which the tests hold it to; numbers are added up in float32. Compiled at first use
// for this machine. Widths are multiples of 16 (rotary: of 32), tensors contiguous.

#include "rows.h"

typedef int64_t integer;

// x (rows, width) -> y, and 1 / root mean square of each row. `shift` is added to the weight (Gemma's 1).
template <typename T>
static void norm(const T* x, const T* weight, T* y, float* scales, integer rows, integer width, float eps, float shift) {
#pragma omp parallel for schedule(static)
    for (integer t = 0; t < rows; t++) scales[t] = norm_row(x + t * width, weight, y + t * width, width, eps, shift);
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
static void gate(const T* gate, const T* up, T* y, integer count, integer tanh) {
#pragma omp parallel for schedule(static)
    for (integer i = 0; i < count; i += 16) {
        const v16 g = load(gate + i);
        const v16 act = tanh ? 0.5f * g * (1.0f + hyperbolic(g)) : g / (1.0f + exponential(-g));
        keep(act * load(up + i), y + i);
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

// x (tokens, heads, d) turned by angles (tokens, d), or its transpose.
template <bool Back, typename T>
static void turn(const T* x, const T* cosine, const T* sine, T* y, integer tokens, integer heads, integer d) {
#pragma omp parallel for schedule(static)
    for (integer t = 0; t < tokens; t++)
        for (integer at = t * heads * d; at < (t + 1) * heads * d; at += d)
            turn_head<Back>(x + at, cosine + t * d, sine + t * d, y + at, d);
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
#define TURN(T) (const T* x, const T* cosine, const T* sine, T* y, integer tokens, integer heads, integer d, integer back)
BOTH(turn, TURN, back ? turn<true>(x, cosine, sine, y, tokens, heads, d) : turn<false>(x, cosine, sine, y, tokens, heads, d))
#define GAIN_BACKWARD(T) \
    (const T* dy, const T* y, const float* g, T* of_y, float* of_g, integer rows, integer width, integer workers)
BOTH(gain_backward, GAIN_BACKWARD, gain_backward(dy, y, g, of_y, of_g, rows, width, workers))
