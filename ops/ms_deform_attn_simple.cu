// Multi-scale deformable attention on a GPU as it was first written: one thread per output channel, and in the backward
// pass one atomic addition per channel and corner. Short, readable, and the yardstick for ms_deform_attn.cu, which is fast.
//
// float32 and float64, weights and places spelled out. nbs/03a2_ops.native.ipynb explains the interface.

#include <cuda_runtime.h>
#include <cstdint>

struct Sizes { int64_t images, cells, queries, heads, dim, levels, points, reference, reference_images, reference_levels; };

namespace {

constexpr int MOST_LEVELS = 64;
struct Shapes { int h[MOST_LEVELS], w[MOST_LEVELS]; };   // a kernel's argument, so that nothing is copied to the device

// The four cells around a place: where they begin in a level (-1 outside), and their shares.
template <class R> struct Corners { int cell[4]; R share[4], fx, fy; };

template <class R> __device__ Corners<R> corners(R x, R y, int h, int w) {
    Corners<R> c = {{-1, -1, -1, -1}, {0, 0, 0, 0}, 0, 0};
    if (!(x > -1 && y > -1 && x < w && y < h)) return c;   // NaN too
    int left = int(floor(x)), top = int(floor(y));
    c.fx = x - left; c.fy = y - top;
    for (int i = 0; i < 4; ++i) {
        int column = left + i % 2, row = top + i / 2;
        c.share[i] = (i % 2 ? c.fx : 1 - c.fx) * (i / 2 ? c.fy : 1 - c.fy);
        if (column >= 0 && column < w && row >= 0 && row < h) c.cell[i] = row * w + column;
    }
    return c;
}

template <class R>
__global__ void forward_kernel(Sizes s, Shapes shapes, const R *value, const R *locations, const R *weights, R *out) {
    int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = s.heads * s.dim;
    if (channel >= s.images * s.queries * step) return;
    int64_t row = channel / s.dim, image = row / s.heads / s.queries;   // a row is one query of one head
    const R *level = value + image * s.cells * step + channel % step;
    R sum = 0;
    for (int l = 0; l < s.levels; ++l) {
        int h = shapes.h[l], w = shapes.w[l];
        for (int p = 0; p < s.points; ++p) {
            int64_t sample = (row * s.levels + l) * s.points + p;
            Corners<R> c = corners(locations[2 * sample] * w - R(0.5), locations[2 * sample + 1] * h - R(0.5), h, w);
            for (int i = 0; i < 4; ++i)
                if (c.cell[i] >= 0) sum += weights[sample] * c.share[i] * level[c.cell[i] * step];
        }
        level += int64_t(h) * w * step;
    }
    out[channel] = sum;
}

// One block per row and one thread per channel; the first thread adds up what belongs to all of them.
template <class R>
__global__ void backward_kernel(Sizes s, Shapes shapes, const R *grad, const R *value, const R *locations, const R *weights, R *dvalue, R *dlocations, R *dweights) {
    __shared__ R parts[3][256];
    int64_t row = blockIdx.x, step = s.heads * s.dim, image = row / s.heads / s.queries, channel = row % s.heads * s.dim + threadIdx.x;
    int64_t level = image * s.cells * step + channel;
    R g = grad[row * s.dim + threadIdx.x];
    for (int l = 0; l < s.levels; ++l) {
        int h = shapes.h[l], w = shapes.w[l];
        for (int p = 0; p < s.points; ++p) {
            int64_t sample = (row * s.levels + l) * s.points + p;
            Corners<R> c = corners(locations[2 * sample] * w - R(0.5), locations[2 * sample + 1] * h - R(0.5), h, w);
            R dx = 0, dy = 0, dweight = 0;
            for (int i = 0; i < 4; ++i) {
                if (c.cell[i] < 0) continue;
                int64_t at = level + c.cell[i] * step;
                R gv = g * value[at];
                dx += (i % 2 ? 1 : -1) * (i / 2 ? c.fy : 1 - c.fy) * gv;
                dy += (i / 2 ? 1 : -1) * (i % 2 ? c.fx : 1 - c.fx) * gv;
                dweight += c.share[i] * gv;
                atomicAdd(dvalue + at, weights[sample] * c.share[i] * g);
            }
            parts[0][threadIdx.x] = dx * weights[sample] * w;
            parts[1][threadIdx.x] = dy * weights[sample] * h;
            parts[2][threadIdx.x] = dweight;
            __syncthreads();
            if (threadIdx.x == 0) {
                R sums[3] = {0, 0, 0};
                for (int i = 0; i < 3; ++i)
                    for (int j = 0; j < s.dim; ++j) sums[i] += parts[i][j];
                dlocations[2 * sample] = sums[0]; dlocations[2 * sample + 1] = sums[1]; dweights[sample] = sums[2];
            }
            __syncthreads();
        }
        level += int64_t(h) * w * step;
    }
}

#ifdef __CUDACC__
template <class... A, class... B> void start(void (*kernel)(A...), int64_t blocks, int threads, cudaStream_t stream, B... arguments) {
    kernel<<<unsigned(blocks), threads, 0, stream>>>(arguments...);
}
#endif

const char *refusal(int type, const Sizes &s, int options) {
    if (type > 1) return "the simple version knows float32 and float64";
    if (options & 1 || s.reference) return "the simple version wants places and weights, no offsets or logits";
    if (options & 2) return "the simple version adds in any order and cannot be deterministic";
    if (s.levels > MOST_LEVELS) return "more than 64 levels";
    if (s.dim > 256) return "more than 256 channels per head";
    if (s.images * s.queries * s.heads >= INT32_MAX) return "too many queries for one launch";
    return nullptr;
}

const char *verdict() { cudaError_t e = cudaGetLastError(); return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

Shapes shapes_of(const Sizes &s, const int64_t *shapes) {
    Shapes all = {};
    for (int l = 0; l < s.levels; ++l) all.h[l] = int(shapes[2 * l]), all.w[l] = int(shapes[2 * l + 1]);
    return all;
}

template <class R> const char *run_forward(const Sizes &s, const Shapes &shapes, cudaStream_t stream, const void *value, const void *locations, const void *weights, void *out) {
    int64_t channels = s.images * s.queries * s.heads * s.dim;
    if (channels) start(forward_kernel<R>, (channels + 1023) / 1024, 1024, stream, s, shapes, (const R *)value, (const R *)locations, (const R *)weights, (R *)out);
    return verdict();
}

template <class R> const char *run_backward(const Sizes &s, const Shapes &shapes, cudaStream_t stream, const void *grad, const void *value, const void *locations, const void *weights,
                                            void *dvalue, void *dlocations, void *dweights) {
    int64_t rows = s.images * s.queries * s.heads;
    if (rows && s.dim) start(backward_kernel<R>, rows, int(s.dim), stream, s, shapes, (const R *)grad, (const R *)value, (const R *)locations, (const R *)weights, (R *)dvalue, (R *)dlocations, (R *)dweights);
    return verdict();
}

}  // namespace

extern "C" const char *forward(int type, const Sizes *s, const int64_t *shapes, int options, int64_t where, const void *value, const void *locations, const void *weights, const void *, void *out) {
    if (const char *why = refusal(type, *s, options)) return why;
    return (type ? run_forward<double> : run_forward<float>)(*s, shapes_of(*s, shapes), cudaStream_t(where), value, locations, weights, out);
}

extern "C" const char *backward(int type, const Sizes *s, const int64_t *shapes, int options, int64_t where, const void *grad, const void *value, const void *locations, const void *weights, const void *,
                                void *dvalue, void *dlocations, void *dweights) {
    if (const char *why = refusal(type, *s, options)) return why;
    return (type ? run_backward<double> : run_backward<float>)(*s, shapes_of(*s, shapes), cudaStream_t(where), grad, value, locations, weights, dvalue, dlocations, dweights);
}
