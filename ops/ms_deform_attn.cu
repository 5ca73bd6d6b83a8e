// Multi-scale deformable attention on a GPU, forward and backward, behind a plain C interface.
//
// nbs/03a2_ops.native.ipynb explains the interface, nbs/03a_ops.deform_attn.ipynb the arithmetic, and
// nbs/03a3_ops.triton_kernel.ipynb the ideas: tiles of queries that look at the same cells, loads of 16 bytes, rows (one query
// of one head) that never share an image with another's. ms_deform_attn_simple.cu is the same without any of them.
//
// A row belongs to `lanes` neighbouring threads of a warp, 4 for 32 channels of 16 bits and 8 for 32 of float32, and each keeps
// V channels of 16 bytes; so a warp works on several rows. It goes through their samples in rounds of 128:
//
//   prepare   each thread finds out four of the 128 samples, each once: places are read side by side, as they lie in memory, and cell,
//             fractions and weight go to shared memory;
//   work      for each sample all threads of a row read these 16 bytes at once, then the four corners;
//   hand in   (backward) the sums for the sample, which have taken its place in shared memory, are written side by side.
//
// Warps never wait for each other. Sizes are arguments: no limit but 64 levels and 2^26 cells, nothing fetched from the device.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstdint>

struct Sizes { int64_t images, cells, queries, heads, dim, levels, points, reference, reference_images, reference_levels; };

namespace {

constexpr int WARP = 32, WARPS = 8, ROUND = 128, MOST_LEVELS = 64, SIDE = 8;
constexpr unsigned ALL = 0xffffffffu;
enum { SOFTMAX = 1, DETERMINISTIC = 2 };

struct Level { int h, w, start, first, across; };   // size, first cell, first tile, tiles side by side

// T is the type of values, weights and outputs; R that of places, of gradients in memory, and of all arithmetic.
template <class T, class R> struct Call {
    Sizes s;
    Level level[MOST_LEVELS];
    int tiles, group, per_tile, lanes;   // of an image; heads and queries of a tile; threads of a row
    bool walk, softmax;                  // whether queries are the cells, and tiles squares of them
    const T *grad, *value, *weights;
    const R *locations, *reference;
    T *out;
    R *dvalue, *dlocations, *dweights;
    unsigned long long *units;           // the gradient of value as whole numbers, where it shall be deterministic
    const unsigned long long *bounds;    // bits of the largest |grad| and |weight| as double
};

template <class R> struct alignas(4 * sizeof(R)) Sample { int code; R fx, fy, weight; };   // code: cell + w + 1, and a bit for each corner inside
struct Row { int64_t at; int query; };                                                     // at: (image, query, head) in one number, or -1

// ---- whose -------------------------------------------------------------------------------------------------------------

// The image of this block; it never works for two.
template <class C> __device__ int64_t image_of(const C &c) { return blockIdx.x / (c.s.heads / c.group) / c.tiles; }

// The r-th row of this block.
template <class C> __device__ Row row_of(const C &c, int r) {
    int sets = int(c.s.heads) / c.group, head = int(blockIdx.x % sets) * c.group + r % c.group, tile = int(blockIdx.x / sets % c.tiles);
    r /= c.group;
    if (r >= c.per_tile) return {-1, 0};
    int query = tile * c.per_tile + r;
    if (c.walk) {
        int l = 0;
        while (l + 1 < c.s.levels && tile >= c.level[l + 1].first) ++l;
        Level v = c.level[l];
        int y = (tile - v.first) / v.across * SIDE + r / SIDE, x = (tile - v.first) % v.across * SIDE + r % SIDE;
        query = y < v.h && x < v.w ? v.start + y * v.w + x : int(c.s.queries);
    }
    if (query >= c.s.queries) return {-1, 0};
    return {(image_of(c) * c.s.queries + query) * c.s.heads + head, query};
}

// ---- prepare -----------------------------------------------------------------------------------------------------------

// Where a sample lies in a warp's shared memory: such that neither writing 8 samples of a row nor reading one sample of 8 rows collides.
__device__ int slot(int k, int row, int rows) { return k * rows + (row ^ (k & (rows - 1))); }

// Sum of, or largest among, the neighbouring `lanes` threads; all of them get it.
template <class R> __device__ R sum_of(R x, int lanes) { for (int d = lanes / 2; d; d /= 2) x += __shfl_xor_sync(ALL, x, d); return x; }
template <class R> __device__ R most_of(R x, int lanes) { for (int d = lanes / 2; d; d /= 2) { R y = __shfl_xor_sync(ALL, x, d); x = y > x ? y : x; } return x; }

// Largest logit of a row and the sum of exponentials of the distances to it.
template <class T, class R> __device__ void softmax_parts(const Call<T, R> &c, Row me, int lane, R &peak, R &mass) {
    int samples = int(c.s.levels * c.s.points), n = me.at < 0 ? 0 : samples;
    const T *logits = c.weights + me.at * samples;
    peak = -INFINITY; mass = 0;
    for (int k = lane; k < n; k += c.lanes) peak = R(logits[k]) > peak ? R(logits[k]) : peak;
    peak = most_of(peak, c.lanes);
    for (int k = lane; k < n; k += c.lanes) mass += exp(R(logits[k]) - peak);
    mass = sum_of(mass, c.lanes);
}

template <class T, class R> __device__ R weight_of(const Call<T, R> &c, int64_t sample, R peak, R mass) {
    R weight = R(c.weights[sample]);
    return c.softmax ? exp(weight - peak) / mass : weight;
}

template <class T, class R> __device__ Sample<R> sample_of(const Call<T, R> &c, Row row, int k, R peak, R mass) {
    int l = k / int(c.s.points), w = c.level[l].w, h = c.level[l].h;
    int64_t sample = row.at * c.s.levels * c.s.points + k;
    R x = c.locations[2 * sample], y = c.locations[2 * sample + 1];
    if (c.s.reference) {   // offsets from a point in cells, or from a box in half sizes
        int64_t image = c.s.reference_images > 1 ? image_of(c) : 0, numbers = c.s.reference;
        const R *from = c.reference + ((image * c.s.queries + row.query) * c.s.reference_levels + (c.s.reference_levels > 1 ? l : 0)) * numbers;
        x = from[0] + x * (numbers == 2 ? R(1) / w : from[2] * (R(0.5) / c.s.points));
        y = from[1] + y * (numbers == 2 ? R(1) / h : from[3] * (R(0.5) / c.s.points));
    }
    x = x * w - R(0.5); y = y * h - R(0.5);
    if (!(x > -1 && y > -1 && x < w && y < h)) return {0, 0, 0, 0};   // outside, or not finite
    R left = floor(x), top = floor(y);
    int i = int(left), j = int(top);
    int inside = (j >= 0 && i >= 0) | (j >= 0 && i + 1 < w) << 1 | (j + 1 < h && i >= 0) << 2 | (j + 1 < h && i + 1 < w) << 3;
    return {(c.level[l].start + j * w + i + w + 1) << 4 | inside, x - left, y - top, weight_of(c, sample, peak, mass)};
}

// One round: samples k0 and following of all rows of this warp, into shared memory.
template <class T, class R> __device__ void prepare(const Call<T, R> &c, Sample<R> *mine, Row me, int k0, R peak, R mass) {
    int rows = WARP / c.lanes, many = ROUND / rows, samples = int(c.s.levels * c.s.points);
    for (int e = threadIdx.x % WARP; e < ROUND; e += WARP) {
        int row = e / many, k = e % many, from = row * c.lanes;
        Row its = {__shfl_sync(ALL, me.at, from), __shfl_sync(ALL, me.query, from)};
        R p = __shfl_sync(ALL, peak, from), m = __shfl_sync(ALL, mass, from);
        mine[slot(k, row, rows)] = its.at >= 0 && k0 + k < samples ? sample_of(c, its, k0 + k, p, m) : Sample<R>{0, 0, 0, 0};
    }
    __syncwarp();
}

// ---- work --------------------------------------------------------------------------------------------------------------

// V channels of one corner, by one load of 16 bytes where V is more than one; zeros where it is not `there`.
template <int V, class T, class R> __device__ __forceinline__ void read(const T *at, bool there, R (&x)[V]) {
    if constexpr (V == 1) x[0] = there ? R(__ldg(at)) : R(0);
    else {
        static_assert(V * sizeof(T) == 16, "a load is 16 bytes");
        uint4 raw = {0, 0, 0, 0};
        if (there) raw = __ldg(reinterpret_cast<const uint4 *>(at));
        const T *part = reinterpret_cast<const T *>(&raw);
        for (int i = 0; i < V; ++i) x[i] = R(part[i]);
    }
}

template <int V, class R> __device__ __forceinline__ void shares_of(const Sample<R> &s, R (&share)[V]) {
    share[0] = (1 - s.fy) * (1 - s.fx); share[1] = (1 - s.fy) * s.fx; share[2] = s.fy * (1 - s.fx); share[3] = s.fy * s.fx;
}

template <class T, class R, int V>
__global__ void __launch_bounds__(WARP *WARPS, 3) forward_kernel(const __grid_constant__ Call<T, R> c) {
    __shared__ Sample<R> stage[WARPS][ROUND];
    const int lane = threadIdx.x % c.lanes, rows = WARP / c.lanes, row = threadIdx.x % WARP / c.lanes, many = ROUND / rows;
    const int points = int(c.s.points), samples = int(c.s.levels) * points, dim = int(c.s.dim);
    const int64_t step = c.s.heads * dim;
    Sample<R> *mine = stage[threadIdx.x / WARP];
    for (int r = threadIdx.x / WARP * rows; r < c.per_tile * c.group; r += blockDim.x / WARP * rows) {
        Row me = row_of(c, r + row);
        R peak = 0, mass = 1;
        if (c.softmax) softmax_parts(c, me, lane, peak, mass);
        for (int first = 0; first < dim; first += c.lanes * V) {
            const int channel = first + lane * V;
            const T *image = c.value + image_of(c) * c.s.cells * step + (me.at < 0 ? 0 : me.at % c.s.heads) * dim + channel;
            R sum[V] = {};
            for (int k0 = 0; k0 < samples; k0 += many) {
                prepare(c, mine, me, k0, peak, mass);
                int k1 = samples - k0 < many ? samples - k0 : many, l = k0 / points, p = k0 % points;
#pragma unroll 2
                for (int k = 0; k < k1; ++k) {
                    Sample<R> s = mine[slot(k, row, rows)];
                    int w = c.level[l].w, code = channel < dim ? s.code : 0;
                    if (++p == points) p = 0, ++l;
                    const T *at = image + ((code >> 4) - w - 1) * step;
                    R share[4], corner[4][V];
                    shares_of(s, share);
                    read<V>(at, code & 1, corner[0]); read<V>(at + step, code & 2, corner[1]);
                    read<V>(at + w * step, code & 4, corner[2]); read<V>(at + (w + 1) * step, code & 8, corner[3]);
                    for (int i = 0; i < 4; ++i)
                        for (int v = 0; v < V; ++v) sum[v] += s.weight * share[i] * corner[i][v];
                }
                __syncwarp();
            }
            if (me.at < 0 || channel >= dim) continue;
            alignas(16) T result[V];
            for (int v = 0; v < V; ++v) result[v] = T(sum[v]);
            T *to = c.out + me.at * dim + channel;
            if constexpr (V > 1) *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<uint4 *>(result);
            else *to = result[0];
        }
    }
}

// ---- backward ----------------------------------------------------------------------------------------------------------

// How many units make one, such that `samples` addends, none above the product of the bounds, stay below 2^62.
__device__ double unit_of(const unsigned long long *bounds, bool softmax, int64_t samples) {
    double most = __longlong_as_double(bounds[0]) * (softmax ? 1. : __longlong_as_double(bounds[1])) * samples;
    int exponent = 0;
    if (most > 0 && most < INFINITY) frexp(most, &exponent);
    exponent = 62 - exponent > 126 ? -64 : exponent;
    return most < INFINITY ? ldexp(1., 62 - exponent) : NAN;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool FOUR_AT_ONCE = true;   // atomic additions of four neighbours by one instruction
#else
constexpr bool FOUR_AT_ONCE = false;
#endif

template <int V, class R> __device__ __forceinline__ void add_to(R *at, const R (&x)[V]) {
    if constexpr (FOUR_AT_ONCE && V % 4 == 0)
        for (int v = 0; v < V; v += 4) atomicAdd(reinterpret_cast<float4 *>(at + v), make_float4(x[v], x[v + 1], x[v + 2], x[v + 3]));
    else
        for (int v = 0; v < V; ++v) atomicAdd(at + v, x[v]);
}

template <class T, class R, int V>
__global__ void __launch_bounds__(WARP *WARPS, 3) backward_kernel(const __grid_constant__ Call<T, R> c) {
    __shared__ Sample<R> stage[WARPS][ROUND];
    const int lane = threadIdx.x % c.lanes, rows = WARP / c.lanes, row = threadIdx.x % WARP / c.lanes, many = ROUND / rows;
    const int points = int(c.s.points), samples = int(c.s.levels) * points, dim = int(c.s.dim);
    const int64_t step = c.s.heads * dim;
    const R unit = c.units ? R(unit_of(c.bounds, c.softmax, c.s.queries * c.s.points)) : R(1);
    Sample<R> *mine = stage[threadIdx.x / WARP];
    for (int r = threadIdx.x / WARP * rows; r < c.per_tile * c.group; r += blockDim.x / WARP * rows) {
        Row me = row_of(c, r + row);
        R peak = 0, mass = 1, mean = 0;
        if (c.softmax) softmax_parts(c, me, lane, peak, mass);
        for (int first = 0; first < dim; first += c.lanes * V) {
            const int channel = first + lane * V;
            const int64_t image = image_of(c) * c.s.cells * step + (me.at < 0 ? 0 : me.at % c.s.heads) * dim + channel;
            R g[V];
            read<V>(c.grad + me.at * dim + channel, me.at >= 0 && channel < dim, g);
            for (int k0 = 0; k0 < samples; k0 += many) {
                prepare(c, mine, me, k0, peak, mass);
                int k1 = samples - k0 < many ? samples - k0 : many, l = k0 / points, p = k0 % points;
                for (int k = 0; k < k1; ++k) {
                    Sample<R> s = mine[slot(k, row, rows)];
                    int w = c.level[l].w, h = c.level[l].h, code = channel < dim ? s.code : 0;
                    if (++p == points) p = 0, ++l;
                    const int64_t at = image + ((code >> 4) - w - 1) * step, offset[4] = {0, step, w * step, (w + 1) * step};
                    R share[4], dot[4];
                    shares_of(s, share);
                    for (int i = 0; i < 4; ++i) {
                        R corner[V];
                        read<V>(c.value + at + offset[i], code >> i & 1, corner);
                        dot[i] = 0;
                        for (int v = 0; v < V; ++v) dot[i] += g[v] * corner[v];
                    }
                    for (int i = 0; i < 4; ++i) {
                        if (!(code >> i & 1)) continue;
                        R amount[V];
                        for (int v = 0; v < V; ++v) amount[v] = s.weight * share[i] * g[v];
                        if (c.units) for (int v = 0; v < V; ++v) atomicAdd(c.units + at + offset[i] + v, (unsigned long long)(long long)(amount[v] * unit));
                        else add_to(c.dvalue + at + offset[i], amount);
                    }
                    R dx = sum_of(((1 - s.fy) * (dot[1] - dot[0]) + s.fy * (dot[3] - dot[2])) * s.weight * w, c.lanes);
                    R dy = sum_of(((1 - s.fx) * (dot[2] - dot[0]) + s.fx * (dot[3] - dot[1])) * s.weight * h, c.lanes);
                    R dweight = sum_of(share[0] * dot[0] + share[1] * dot[1] + share[2] * dot[2] + share[3] * dot[3], c.lanes);
                    if (c.softmax) dweight *= s.weight;
                    if (s.code) mean += dweight;
                    if (lane == 0) mine[slot(k, row, rows)] = s.code ? Sample<R>{0, dx, dy, dweight} : Sample<R>{0, 0, 0, 0};
                }
                __syncwarp();
                for (int e = threadIdx.x % WARP; e < ROUND; e += WARP) {
                    int its = e / many, k = e % many;
                    int64_t of = __shfl_sync(ALL, me.at, its * c.lanes), sample = of * samples + k0 + k;
                    if (of < 0 || k >= k1) continue;
                    Sample<R> s = mine[slot(k, its, rows)];
                    bool more = first > 0;   // of a head with more channels than a warp holds
                    c.dlocations[2 * sample] = s.fx + (more ? c.dlocations[2 * sample] : 0);
                    c.dlocations[2 * sample + 1] = s.fy + (more ? c.dlocations[2 * sample + 1] : 0);
                    c.dweights[sample] = s.weight + (more ? c.dweights[sample] : 0);
                }
                __syncwarp();
            }
        }
        if (c.softmax && me.at >= 0)
            for (int k = lane; k < samples; k += c.lanes) c.dweights[me.at * samples + k] -= weight_of(c, me.at * samples + k, peak, mass) * mean;
    }
}

// ---- deterministic -----------------------------------------------------------------------------------------------------

// The largest |x|, as bits of a double: they are ordered like the numbers, and NaN is above all.
template <class T> __global__ void bound_kernel(const T *x, int64_t n, unsigned long long *bound) {
    unsigned long long most = 0;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        unsigned long long bits = __double_as_longlong(double(x[i])) & 0x7fffffffffffffffull;
        most = bits > most ? bits : most;
    }
    most = most_of(most, WARP);
    if (threadIdx.x % WARP == 0) atomicMax(bound, most);
}

template <class T, class R> __global__ void gather_kernel(const __grid_constant__ Call<T, R> c, int64_t n) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) c.dvalue[i] = R((long long)(c.units[i]) / unit_of(c.bounds, c.softmax, c.s.queries * c.s.points));
}

// ---- launch ------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
template <class... A, class... B> void start(void (*kernel)(A...), int64_t blocks, int threads, cudaStream_t stream, B... arguments) {
    kernel<<<unsigned(blocks), threads, 0, stream>>>(arguments...);
}
#endif

const char *verdict() { cudaError_t e = cudaGetLastError(); return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

int power_of_two(int64_t n) { int p = 1; while (p < n) p *= 2; return p; }

bool aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Tiles, and levels with their first cells and tiles. A tile is 8 x 8 cells where the queries are the cells, otherwise the next 64 or fewer.
template <class T, class R> const char *plan(Call<T, R> &c, const int64_t *shapes, int V, int64_t &blocks, int &threads) {
    if (c.s.levels > MOST_LEVELS) return "more than 64 levels";
    if (c.s.cells >= 1 << 26 || c.s.queries >= 1 << 26 || c.s.levels * c.s.points >= 1 << 26) return "2^26 cells, queries or samples, or more";
    c.walk = c.s.queries == c.s.cells;
    int64_t start = 0, first = 0;
    for (int l = 0; l < c.s.levels; ++l) {
        int64_t h = shapes[2 * l], w = shapes[2 * l + 1], across = (w + SIDE - 1) / SIDE;
        c.level[l] = {int(h), int(w), int(start), int(first), int(across)};
        start += h * w; first += across * ((h + SIDE - 1) / SIDE);
    }
    c.per_tile = c.walk || c.s.queries >= SIDE * SIDE ? SIDE * SIDE : power_of_two(c.s.queries);
    c.tiles = int(c.walk ? first : (c.s.queries + c.per_tile - 1) / c.per_tile);
    c.lanes = power_of_two((c.s.dim + V - 1) / V);
    if (c.lanes > WARP) c.lanes = WARP;
    c.group = c.s.dim * sizeof(T) <= 64 && c.s.heads % 2 == 0 ? 2 : 1;   // two heads fill a cache line of 128 bytes
    blocks = c.s.images * c.tiles * (c.s.heads / c.group);
    int warps = (c.per_tile * c.group * c.lanes + WARP - 1) / WARP;
    threads = (warps < WARPS ? warps : WARPS) * WARP;
    return blocks > INT32_MAX ? "too many queries for one launch" : nullptr;
}

template <class T, class R, int V> const char *run(Call<T, R> c, const int64_t *shapes, bool back, bool deterministic, cudaStream_t stream) {
    int64_t blocks, values = c.s.images * c.s.cells * c.s.heads * c.s.dim;
    int threads;
    if (const char *why = plan(c, shapes, V, blocks, threads)) return why;
    if (!blocks || !c.s.dim) return nullptr;
    if (!back) { start(forward_kernel<T, R, V>, blocks, threads, stream, c); return verdict(); }
    unsigned long long *scratch = nullptr;
    if (deterministic) {
        size_t bytes = (values + 2) * sizeof *scratch;
        if (cudaMallocAsync((void **)&scratch, bytes, stream) != cudaSuccess) return verdict();
        cudaMemsetAsync(scratch, 0, bytes, stream);
        int64_t rows = c.s.images * c.s.queries * c.s.heads, outputs = rows * c.s.dim, samples = rows * c.s.levels * c.s.points;
        start(bound_kernel<T>, outputs < 1 << 20 ? outputs / 4096 + 1 : 1024, 256, stream, c.grad, outputs, scratch);
        start(bound_kernel<T>, samples < 1 << 20 ? samples / 4096 + 1 : 1024, 256, stream, c.weights, samples, scratch + 1);
        c.bounds = scratch; c.units = scratch + 2;
    }
    start(backward_kernel<T, R, V>, blocks, threads, stream, c);
    if (deterministic) {
        start(gather_kernel<T, R>, (values + 255) / 256, 256, stream, c, values);
        cudaFreeAsync(scratch, stream);
    }
    return verdict();
}

template <class T, class R>
const char *call(const Sizes &s, const int64_t *shapes, int options, int64_t where, const void *grad, const void *value, const void *locations, const void *weights, const void *reference,
                 void *out, void *dvalue, void *dlocations, void *dweights) {
    Call<T, R> c = {};
    c.s = s; c.softmax = options & SOFTMAX;
    c.grad = (const T *)grad; c.value = (const T *)value; c.weights = (const T *)weights; c.locations = (const R *)locations; c.reference = (const R *)reference;
    c.out = (T *)out; c.dvalue = (R *)dvalue; c.dlocations = (R *)dlocations; c.dweights = (R *)dweights;
    constexpr int V = 16 / sizeof(T);
    bool wide = s.dim % V == 0 && aligned(value) && aligned(grad) && aligned(out) && aligned(dvalue);
    return (wide ? run<T, R, V> : run<T, R, 1>)(c, shapes, grad != nullptr, options & DETERMINISTIC, cudaStream_t(where));
}

const char *any_type(int type, const Sizes *s, const int64_t *shapes, int options, int64_t where, const void *grad, const void *value, const void *locations, const void *weights, const void *reference,
                     void *out, void *dvalue, void *dlocations, void *dweights) {
    switch (type) {
        case 0: return call<float, float>(*s, shapes, options, where, grad, value, locations, weights, reference, out, dvalue, dlocations, dweights);
        case 1: return call<double, double>(*s, shapes, options, where, grad, value, locations, weights, reference, out, dvalue, dlocations, dweights);
        case 2: return call<__half, float>(*s, shapes, options, where, grad, value, locations, weights, reference, out, dvalue, dlocations, dweights);
        case 3: return call<__nv_bfloat16, float>(*s, shapes, options, where, grad, value, locations, weights, reference, out, dvalue, dlocations, dweights);
    }
    return "unknown type";
}

}  // namespace

extern "C" const char *forward(int type, const Sizes *s, const int64_t *shapes, int options, int64_t where, const void *value, const void *locations, const void *weights, const void *reference, void *out) {
    return any_type(type, s, shapes, options, where, nullptr, value, locations, weights, reference, out, nullptr, nullptr, nullptr);
}

extern "C" const char *backward(int type, const Sizes *s, const int64_t *shapes, int options, int64_t where, const void *grad, const void *value, const void *locations, const void *weights, const void *reference,
                                void *dvalue, void *dlocations, void *dweights) {
    return any_type(type, s, shapes, options, where, grad, value, locations, weights, reference, nullptr, dvalue, dlocations, dweights);
}
