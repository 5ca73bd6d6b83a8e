// Multi-scale deformable attention on the CPU, forward and backward, behind a plain C interface.
//
// The chapter nbs/03a2_ops.native.ipynb explains the interface, which ms_deform_attn*.cu share, and nbs/03a_ops.deform_attn.ipynb
// the arithmetic. Two things make it fast: a point is read once for all channels of a head, which lie side by side and fill
// vector registers, and nothing is written down between a reading and its sum.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Sizes { int64_t images, cells, queries, heads, dim, levels, points, reference, reference_images, reference_levels; };

// One call. value (images, cells, heads, dim); locations (images, queries, heads, levels, points, 2); weights likewise without
// the 2; reference (images or 1, queries, levels or 1, 2 or 4) or null.
template <class T> struct Call {
    Sizes s;
    bool softmax;
    const int64_t *shapes;   // h, w of each level
    const T *grad, *value, *locations, *weights, *reference;
    T *out, *dvalue, *dlocations, *dweights;
};

// The four cells around a point, as offsets into a level, and their shares. Cells outside have no share, and the offset of one inside.
template <class T> struct Corners {
    int64_t at[4];
    T share[4], fx, fy, in[4];   // in: 1 where the cell is inside
};

// False where the whole point is outside; comparisons with NaN are false too.
template <class T> inline bool corners(T x, T y, int64_t h, int64_t w, int64_t stride, Corners<T> &c) {
    if (!(x > -1 && y > -1 && x < T(w) && y < T(h))) return false;
    T left = std::floor(x), top = std::floor(y);
    c.fx = x - left; c.fy = y - top;
    int64_t x0 = int64_t(left), y0 = int64_t(top);
    bool l = x0 >= 0, r = x0 + 1 < w, t = y0 >= 0, b = y0 + 1 < h;
    int64_t xa = l ? x0 : 0, xb = r ? x0 + 1 : w - 1, ya = (t ? y0 : 0) * w, yb = (b ? y0 + 1 : h - 1) * w;
    c.at[0] = (ya + xa) * stride; c.at[1] = (ya + xb) * stride; c.at[2] = (yb + xa) * stride; c.at[3] = (yb + xb) * stride;
    c.in[0] = t && l; c.in[1] = t && r; c.in[2] = b && l; c.in[3] = b && r;
    c.share[0] = c.in[0] * (1 - c.fy) * (1 - c.fx); c.share[1] = c.in[1] * (1 - c.fy) * c.fx;
    c.share[2] = c.in[2] * c.fy * (1 - c.fx); c.share[3] = c.in[3] * c.fy * c.fx;
    return true;
}

// e^x for x <= 0 that the compiler can vectorise; relative error below 2e-7.
inline float exponential(float x) {
    x = x < -87.f ? -87.f : x;
    float shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;   // the nearest integer ends up in the last bits
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 0.5f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return (p * r * r + r + 1) * scale;
}
inline double exponential(double x) { return std::exp(x); }

// The weights of one query and head: as given, or the softmax of the logits.
template <class T> inline const T *weigh(const Call<T> &c, const T *given, T *room) {
    if (!c.softmax) return given;
    int64_t n = c.s.levels * c.s.points;
    T top = given[0], sum = 0;
    for (int64_t i = 1; i < n; i++) top = given[i] > top || given[i] != given[i] ? given[i] : top;
    for (int64_t i = 0; i < n; i++) room[i] = exponential(given[i] - top);
    for (int64_t i = 0; i < n; i++) sum += room[i];
    for (int64_t i = 0; i < n; i++) room[i] /= sum;
    return room;
}

// Where a level's points of one query lie: position = origin + location * step, in cells.
template <class T> struct Frame { T ox, oy, sx, sy; };
template <class T> inline Frame<T> frame(const Call<T> &c, int64_t n, int64_t q, int64_t l, int64_t h, int64_t w) {
    if (!c.reference) return {T(-0.5), T(-0.5), T(w), T(h)};
    int64_t image = c.s.reference_images == 1 ? 0 : n, level = c.s.reference_levels == 1 ? 0 : l;
    const T *r = c.reference + ((image * c.s.queries + q) * c.s.reference_levels + level) * c.s.reference;
    T ox = r[0] * w - T(0.5), oy = r[1] * h - T(0.5);
    if (c.s.reference == 2) return {ox, oy, 1, 1};
    T half = T(0.5) / c.s.points;
    return {ox, oy, r[2] * half * w, r[3] * half * h};
}

// The output of queries [from, to) of one image and head. D is the number of channels where it is known when compiling, otherwise 0.
template <class T, int D> void forward_part(const Call<T> &c, int64_t n, int64_t m, int64_t from, int64_t to, T *room) {
    const Sizes &s = c.s;
    const int64_t dim = D ? D : s.dim, stride = s.heads * dim, samples = s.levels * s.points;
    for (int64_t q = from; q < to; q++) {
        int64_t row = (n * s.queries + q) * s.heads + m;
        const T *weights = weigh(c, c.weights + row * samples, room), *at = c.locations + row * samples * 2;
        const T *level = c.value + n * s.cells * stride + m * dim;
        T local[D ? D : 1], *sum = D ? local : c.out + row * dim;
        for (int64_t d = 0; d < dim; d++) sum[d] = 0;
        for (int64_t l = 0; l < s.levels; l++) {
            int64_t h = c.shapes[2 * l], w = c.shapes[2 * l + 1];
            Frame<T> f = frame(c, n, q, l, h, w);
            for (int64_t k = 0; k < s.points; k++, at += 2, weights++) {
                Corners<T> p;
                if (!corners(f.ox + at[0] * f.sx, f.oy + at[1] * f.sy, h, w, stride, p)) continue;
                const T *v0 = level + p.at[0], *v1 = level + p.at[1], *v2 = level + p.at[2], *v3 = level + p.at[3];
                T a0 = *weights * p.share[0], a1 = *weights * p.share[1], a2 = *weights * p.share[2], a3 = *weights * p.share[3];
                #pragma omp simd
                for (int64_t d = 0; d < dim; d++) sum[d] += a0 * v0[d] + a1 * v1[d] + a2 * v2[d] + a3 * v3[d];
            }
            level += h * w * stride;
        }
        if (D) for (int64_t d = 0; d < dim; d++) c.out[row * dim + d] = local[d];
    }
}

// All gradients of one image and head: nobody else touches these cells of dvalue, so they are the same on every run.
template <class T, int D> void backward_part(const Call<T> &c, int64_t n, int64_t m, T *room) {
    const Sizes &s = c.s;
    const int64_t dim = D ? D : s.dim, stride = s.heads * dim, samples = s.levels * s.points;
    for (int64_t q = 0; q < s.queries; q++) {
        int64_t row = (n * s.queries + q) * s.heads + m, start = n * s.cells * stride + m * dim;
        const T *weights = weigh(c, c.weights + row * samples, room), *at = c.locations + row * samples * 2, *g = c.grad + row * dim;
        T *dw = c.dweights + row * samples, *dat = c.dlocations + row * samples * 2;
        for (int64_t l = 0, i = 0; l < s.levels; l++) {
            int64_t h = c.shapes[2 * l], w = c.shapes[2 * l + 1];
            const T *level = c.value + start;
            T *dlevel = c.dvalue + start;
            Frame<T> f = frame(c, n, q, l, h, w);
            for (int64_t k = 0; k < s.points; k++, i++) {
                Corners<T> p;
                dw[i] = dat[2 * i] = dat[2 * i + 1] = 0;
                if (!corners(f.ox + at[2 * i] * f.sx, f.oy + at[2 * i + 1] * f.sy, h, w, stride, p)) continue;
                T dot[4];
                for (int j = 0; j < 4; j++) {
                    const T *v = level + p.at[j];
                    T *dv = dlevel + p.at[j], a = weights[i] * p.share[j], sum = 0;
                    #pragma omp simd reduction(+ : sum)
                    for (int64_t d = 0; d < dim; d++) { sum += g[d] * v[d]; dv[d] += a * g[d]; }
                    dot[j] = sum * p.in[j];
                }
                dw[i] = (1 - p.fy) * ((1 - p.fx) * dot[0] + p.fx * dot[1]) + p.fy * ((1 - p.fx) * dot[2] + p.fx * dot[3]);
                dat[2 * i] = weights[i] * w * ((1 - p.fy) * (dot[1] - dot[0]) + p.fy * (dot[3] - dot[2]));
                dat[2 * i + 1] = weights[i] * h * ((1 - p.fx) * (dot[2] - dot[0]) + p.fx * (dot[3] - dot[1]));
            }
            start += h * w * stride;
        }
        if (!c.softmax) continue;
        T mean = 0;
        for (int64_t i = 0; i < samples; i++) mean += weights[i] * dw[i];
        for (int64_t i = 0; i < samples; i++) dw[i] = weights[i] * (dw[i] - mean);
    }
}

// `work(unit, room)` for all units, on as many threads as are worth starting; they end with the call, so a fork later finds none.
template <class T, class Work> void share_out(const Call<T> &c, int64_t units, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    auto labour = [&] {
        std::vector<T> room(c.s.levels * c.s.points);
        for (int64_t u; (u = next++) < units;) work(u, room.data());
    };
    int64_t readings = c.s.images * c.s.queries * c.s.heads * c.s.levels * c.s.points * c.s.dim;
    threads = std::min({threads, units, 1 + readings / 100000});
    std::vector<std::thread> others;
    try { for (int64_t t = 1; t < threads; t++) others.emplace_back(labour); } catch (...) {}   // those that started, and this one, do it all
    labour();
    for (auto &t : others) t.join();
}

template <class T, int D> void run(const Call<T> &c, int64_t threads) {
    const int64_t heads = c.s.heads, queries = c.s.queries, block = 512, blocks = (queries + block - 1) / block;
    if (c.out) share_out(c, c.s.images * heads * blocks, threads, [&](int64_t u, T *room) {
        int64_t b = u % blocks, m = u / blocks % heads, n = u / blocks / heads;
        forward_part<T, D>(c, n, m, b * block, std::min(queries, (b + 1) * block), room);
    });
    else share_out(c, c.s.images * heads, threads, [&](int64_t u, T *room) { backward_part<T, D>(c, u / heads, u % heads, room); });
}

template <class T> void start(const Sizes *s, const int64_t *shapes, int options, int64_t threads, const void *grad, const void *value, const void *locations,
                              const void *weights, const void *reference, void *out, void *dvalue, void *dlocations, void *dweights) {
    Call<T> c{*s, bool(options & 1), shapes, (const T *)grad, (const T *)value, (const T *)locations, (const T *)weights, (const T *)reference,
              (T *)out, (T *)dvalue, (T *)dlocations, (T *)dweights};
    switch (s->dim) {
        case 8: return run<T, 8>(c, threads);
        case 16: return run<T, 16>(c, threads);
        case 32: return run<T, 32>(c, threads);
        case 64: return run<T, 64>(c, threads);
        default: return run<T, 0>(c, threads);
    }
}

}  // namespace

extern "C" {

// 1 where this machine knows the instructions that the file was compiled for.
int runs_here() {
#if defined(__x86_64__) && defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__x86_64__) && defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

// type: 0 float32, 1 float64; options: 1 where weights are logits; `where` is the number of threads. Both return null, or what was wrong.
const char *forward(int type, const Sizes *sizes, const int64_t *shapes, int options, int64_t where, const void *value, const void *locations,
                    const void *weights, const void *reference, void *out) {
    if (type > 1) return "the type is neither float32 nor float64";
    (type ? start<double> : start<float>)(sizes, shapes, options, where, nullptr, value, locations, weights, reference, out, nullptr, nullptr, nullptr);
    return nullptr;
}

// dvalue must come filled with zeros. dlocations are gradients of the places, also where locations are offsets from a reference.
const char *backward(int type, const Sizes *sizes, const int64_t *shapes, int options, int64_t where, const void *grad, const void *value,
                     const void *locations, const void *weights, const void *reference, void *dvalue, void *dlocations, void *dweights) {
    if (type > 1) return "the type is neither float32 nor float64";
    (type ? start<double> : start<float>)(sizes, shapes, options, where, grad, value, locations, weights, reference, nullptr, dvalue, dlocations, dweights);
    return nullptr;
}

}
