// Enough of CUDA for g++ to compile the sources of ops/ and run them on the CPU: for tests of their indices and arithmetic.
// The threads of a block are contexts that run in turn, each up to its next meeting (a barrier or a shuffle).
// That is the order a warp promises, and blocks come one after the other.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH__ 900
using std::exp; using std::floor; using std::frexp; using std::ldexp;

struct dim3 { unsigned x; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// 16-bit numbers, rounded to the nearest, ties to even
struct __half {
    uint16_t bits;
    __half() = default;
    explicit __half(float x) { _Float16 h = _Float16(x); std::memcpy(&bits, &h, 2); }
    explicit operator float() const { _Float16 h; std::memcpy(&h, &bits, 2); return float(h); }
    explicit operator double() const { return float(*this); }
};
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float x) { uint32_t b; std::memcpy(&b, &x, 4); bits = x == x ? uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16) : 0x7fc0; }
    explicit operator float() const { uint32_t b = uint32_t(bits) << 16; float x; std::memcpy(&x, &b, 4); return x; }
    explicit operator double() const { return float(*this); }
};

// ---- threads. A context is entered once; from then on the jumps go without the kernel's help, which would be slow.
struct Fibre { jmp_buf at; ucontext_t context; std::vector<char> stack = std::vector<char>(1 << 16); bool begun = false, done = false; };
static std::vector<Fibre> fibres;
static jmp_buf scheduler;
static std::function<void()> body;
static unsigned current;
static bool any;

static void meet() { if (!_setjmp(fibres[current].at)) _longjmp(scheduler, 1); }
static void __syncthreads() { meet(); }
static void __syncwarp() { meet(); }
static void live() { for (;;) { body(); fibres[current].done = true; meet(); } }

static void resume(Fibre &f) {
    if (_setjmp(scheduler)) return;
    if (f.begun) _longjmp(f.at, 1);
    f.begun = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(); f.context.uc_stack.ss_size = f.stack.size(); f.context.uc_link = nullptr;
    makecontext(&f.context, live, 0);
    setcontext(&f.context);
}

template <class... A, class... B> void start(void (*kernel)(A...), int64_t blocks, int threads, void *, B... arguments) {
    blockDim = {unsigned(threads)}; gridDim = {unsigned(blocks)};
    body = [=] { kernel(arguments...); };
    fibres = std::vector<Fibre>(threads);
    for (int64_t b = 0; b < blocks; ++b) {
        for (auto &f : fibres) f.done = false;
        blockIdx = {unsigned(b)};
        for (any = true; any;) {
            any = false;
            for (current = 0; current < unsigned(threads); ++current)
                if (!fibres[current].done) { threadIdx = {current}; any = true; resume(fibres[current]); }
        }
    }
}

// Two meetings, so that nobody's value is overwritten before all have read it.
template <class T> T __shfl_sync(unsigned, T x, int from) {
    static T seen[1024];
    unsigned me = threadIdx.x;
    seen[me] = x; meet();
    T found = seen[me / 32 * 32 + from % 32]; meet();
    return found;
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int with) { return __shfl_sync(mask, x, (threadIdx.x % 32) ^ with); }

// ---- memory
template <class T> T __ldg(const T *at) { if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) abort(); return *at; }   // as the hardware, no unaligned load
template <class T> void atomicAdd(T *at, T x) { *at += x; }
inline void atomicAdd(float4 *at, float4 x) { if (reinterpret_cast<uintptr_t>(at) % 16) abort(); at->x += x.x; at->y += x.y; at->z += x.z; at->w += x.w; }
inline void atomicMax(unsigned long long *at, unsigned long long x) { if (x > *at) *at = x; }
inline double __longlong_as_double(long long bits) { double x; std::memcpy(&x, &bits, 8); return x; }
inline long long __double_as_longlong(double x) { long long bits; std::memcpy(&bits, &x, 8); return bits; }
using cudaStream_t = void *;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t) { *p = std::malloc(n); return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void *p, int x, size_t n, cudaStream_t) { std::memset(p, x, n); return cudaSuccess; }
inline cudaError_t cudaFreeAsync(void *p, cudaStream_t) { std::free(p); return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return ""; }
