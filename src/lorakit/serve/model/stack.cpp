// Blocks of a decoder one after the other, in one call. Each does
//     h = x + o(attention(turn(q, k), v)),  q, k, v = qkv(norm(x));    y = h + down(act(gate(n)) * up(n)),  n = norm(h)
// by the very functions that are called one at a time elsewhere (elementwise.cpp, native.cpp, linear.cpp), whose addresses are
// given. What is saved is Python between them, and fresh memory for every result.

#include "adapters.h"

struct Functions {
    void (*norm)(const bf16* x, const bf16* weight, bf16* y, float* scales, int64_t rows, int64_t width, float eps, float shift);
    void (*turn)(const bf16* x, int64_t x_head, int64_t x_token, const bf16* cosine, const bf16* sine, bf16* y, int64_t heads,
                 int64_t tokens, int64_t d, int64_t back);
    void (*attend)(const bf16* q, int64_t q_head, int64_t q_token, const bf16* k, int64_t k_head, int64_t k_token, const bf16* v,
                   int64_t v_head, int64_t v_token, bf16* out, bf16* keys, bf16* values, const int32_t* table,
                   int64_t table_width, const int32_t* row, const int32_t* position, int64_t tokens, const int32_t* tiles,
                   int64_t tile_count, int64_t heads, int64_t key_heads, int64_t d, int64_t dv, float scale, float softcap,
                   int64_t window, const float* sinks);
    void (*linear)(const void* layers, int64_t count, const bf16* x, int64_t x_token, int64_t tokens, bf16* y, const Part* parts,
                   int64_t entries, const int32_t* row, const int32_t* start, const float* weight, const int32_t* order,
                   const int32_t* tile, int64_t tiles);
    void (*gate)(const bf16* gates, const bf16* up, bf16* y, int64_t count, int64_t tanh);
};

// The layers of each product lie one after the other: three for qkv, one, two for gate and up, one.
struct Block {
    const bf16 *norm, *second_norm;
    const void *qkv, *o, *gated, *down;
    bf16 *keys, *values;
    const float* sinks;
    int64_t heads, key_heads, d, dv, inner, tanh, window;
    double eps, shift, second_eps, second_shift, scale, softcap;
};

// The step: see batch.Batch.
struct Step {
    const int32_t* table;
    int64_t table_width;
    const int32_t *row, *position;
    int64_t tokens;
    const int32_t* tiles;
    int64_t tile_count;
};

struct Mixture {
    const Part* parts;
    int64_t entries;
    const int32_t *row, *start;
    const float* weight;
    const int32_t *order, *tile;
    int64_t tiles;
};

static void add(const bf16* a, const bf16* b, bf16* y, int64_t count) {
#pragma omp parallel for schedule(static) if (count > 1 << 16)
    for (int64_t i = 0; i < count / 16; i++) keep(load(a + 16 * i) + load(b + 16 * i), y + 16 * i);
    for (int64_t i = count / 16 * 16; i < count; i++) narrow(widen(a[i]) + widen(b[i]), y + i);
}

// x (tokens, hidden) -> y, which may not be x; cosine and sine (tokens, d).
extern "C" __attribute__((visibility("default"))) void stack_bfloat16(const Functions* call, const Block* blocks, int64_t count,
                                                                      const bf16* x, bf16* y, int64_t hidden,
                                                                      const bf16* cosine, const bf16* sine, const Step* step,
                                                                      const Mixture* mixture) {
    static thread_local std::vector<bf16> memory;
    const int64_t tokens = step->tokens;
    int64_t wide = 0, inner = 0, mixed = 0, turned = 0;
    for (int64_t i = 0; i < count; i++) {
        const Block& block = blocks[i];
        const auto most = [](int64_t& own, int64_t other) { own = own > other ? own : other; };
        most(wide, block.heads * block.d + block.key_heads * (block.d + block.dv));
        most(wide, 2 * block.inner), most(wide, hidden);
        most(inner, block.inner), most(mixed, block.heads * block.dv);
        most(turned, (block.heads + block.key_heads) * block.d);
    }
    const int64_t room = (hidden + wide + (inner > mixed ? inner : mixed) + turned) * tokens + 4 * 32;
    if (int64_t(memory.size()) < room) memory.resize(room);
    const auto after = [tokens](bf16* p, int64_t width) { return p + (width * tokens + 31) / 32 * 32; };
    bf16* n = memory.data();
    bf16* products = after(n, hidden);
    bf16* result = after(products, wide);
    bf16* rotated = after(result, inner > mixed ? inner : mixed);
    for (int64_t i = 0; i < count; i++) {
        const Block& b = blocks[i];
        const auto linear = [&](const void* layers, int64_t many, const bf16* from, int64_t width) {
            call->linear(layers, many, from, width, tokens, products, mixture->parts, mixture->entries, mixture->row,
                         mixture->start, mixture->weight, mixture->order, mixture->tile, mixture->tiles);
        };
        const int64_t of_q = b.heads * b.d, of_k = b.key_heads * b.d;
        call->norm(x, b.norm, n, nullptr, tokens, hidden, float(b.eps), float(b.shift));
        linear(b.qkv, 3, n, hidden);
        const bf16 *k = products + tokens * of_q, *v = k + tokens * of_k;
        bf16* turned_k = rotated + tokens * of_q;
        call->turn(products, b.d, of_q, cosine, sine, rotated, b.heads, tokens, b.d, 0);
        call->turn(k, b.d, of_k, cosine, sine, turned_k, b.key_heads, tokens, b.d, 0);
        call->attend(rotated, b.d, of_q, turned_k, b.d, of_k, v, b.dv, b.key_heads * b.dv, result, b.keys, b.values, step->table,
                     step->table_width, step->row, step->position, tokens, step->tiles, step->tile_count, b.heads, b.key_heads,
                     b.d, b.dv, float(b.scale), float(b.softcap), b.window, b.sinks);
        linear(b.o, 1, result, b.heads * b.dv);
        add(x, products, y, tokens * hidden);
        call->norm(y, b.second_norm, n, nullptr, tokens, hidden, float(b.second_eps), float(b.second_shift));
        linear(b.gated, 2, n, hidden);
        call->gate(products, products + tokens * b.inner, result, tokens * b.inner, b.tanh);
        linear(b.down, 1, result, b.inner);
        add(y, products, y, tokens * hidden);
        x = y;
    }
}
