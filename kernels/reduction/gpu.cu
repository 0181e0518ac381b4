// reduce_sum of a matrix: of each row, or of each column (the gradient of a bias).
//
//   row_sums, column_sums           a short sum in one launch
//   row_parts, column_parts         a long one is cut into parts of fixed length, whose sums are float32 ...
//   add_row_parts, add_column_parts ... and added by the next launch, parts of parts if need be
//
// The parts, and the order within each, depend on the shape alone: the bits do not change with the grid. No lane adds
// more than PART / 32 or ROWS / 8 terms one after the other, so that errors of one sign stay few however long the sum.
// Each element is read once, by 16-byte accesses that are neighbours within a warp: memory bandwidth bounds them.

#include "gpu_packs.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int PART = 2048;  // neighbours of a row that a warp adds; gpu.py knows it too
constexpr int ROWS = 64;    // rows of a column that a block adds; likewise

// WIDTH neighbours as they lie in memory, so that many reads wait together before the first is converted and added.
template <int WIDTH, class T> struct Neighbours;

template <> struct Neighbours<PACK, Storage> {
    Pack pack;
    __device__ __forceinline__ void read(const Storage* p) { pack = read_pack(p); }
    __device__ __forceinline__ void clear() { pack.bits = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ float operator[](int k) const { return to_float(pack.element[k]); }
};

template <class T> struct Neighbours<1, T> {
    T element;
    __device__ __forceinline__ void read(const T* p) { element = *p; }
    __device__ __forceinline__ void clear() { element = from_float<T>(0); }
    __device__ __forceinline__ float operator[](int) const { return to_float(element); }
};

// ------------------------------------------------------------------------------------------------------------ rows

// x (rows, columns) -> y (rows, parts): a warp for each part.
template <int WIDTH, class T, class Y>
__device__ __forceinline__ void sum_row_parts(const T* __restrict__ x, Y* __restrict__ y, long long rows,
                                              long long columns) {
    const int lane = threadIdx.x % WARP;
    const long long warp = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const long long warps = static_cast<long long>(gridDim.x) * WARPS;
    const long long parts = (columns + PART - 1) / PART;
    for (long long i = warp; i < rows * parts; i += warps) {
        const long long row = i / parts, start = (i - row * parts) * PART;
        const T* part = x + row * columns + start;
        const int count = static_cast<int>(min(static_cast<long long>(PART), columns - start));
        float sums[WIDTH] = {};  // one for each place in a pack: chains that do not wait for one another
#pragma unroll 4
        for (int j = lane * WIDTH; j < count; j += WARP * WIDTH) {
            Neighbours<WIDTH, T> values;
            values.read(part + j);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sums[k] += values[k];
        }
        float total = 0;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) total += sums[k];
        total = warp_sum(total);
        if (lane == 0) y[i] = from_float<Y>(total);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    row_sums(const Storage* __restrict__ x, Storage* __restrict__ y, long long rows, int columns) {
    if (in_packs(columns, x)) sum_row_parts<PACK>(x, y, rows, columns);
    else sum_row_parts<1>(x, y, rows, columns);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    row_parts(const Storage* __restrict__ x, float* __restrict__ partial, long long rows, long long columns) {
    if (columns % PACK == 0 && in_packs(0, x)) sum_row_parts<PACK>(x, partial, rows, columns);
    else sum_row_parts<1>(x, partial, rows, columns);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_row_parts(const float* __restrict__ partial, Storage* __restrict__ y, long long rows, int parts) {
    sum_row_parts<1>(partial, y, rows, parts);
}

// --------------------------------------------------------------------------------------------------------- columns

// x (rows, columns) -> y (parts, columns): a block for ROWS rows of WARP * WIDTH columns. Each warp adds every WARPS-th
// of these rows, then the warps' sums are added in order; `scratch` holds WARPS * WARP * WIDTH of them.
template <int WIDTH, class T, class Y>
__device__ __forceinline__ void sum_column_parts(const T* __restrict__ x, Y* __restrict__ y, long long rows,
                                                 int columns, float* scratch) {
    constexpr int STRIP = WARP * WIDTH;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int strips = (columns + STRIP - 1) / STRIP;
    const long long parts = (rows + ROWS - 1) / ROWS;
    for (long long tile = blockIdx.x; tile < parts * strips; tile += gridDim.x) {
        const long long part = tile / strips;
        const int left = static_cast<int>(tile - part * strips) * STRIP, column = left + lane * WIDTH;
        Neighbours<WIDTH, T> values[ROWS / WARPS];
#pragma unroll
        for (int r = 0; r < ROWS / WARPS; ++r) {
            const long long row = part * ROWS + r * WARPS + warp;
            if (row < rows && column < columns) values[r].read(x + row * columns + column);
            else values[r].clear();
        }
        float sums[WIDTH] = {};
#pragma unroll
        for (int r = 0; r < ROWS / WARPS; ++r) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sums[i] += values[r][i];
        }
        __syncthreads();  // the tile before has been read
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) scratch[warp * STRIP + lane * WIDTH + i] = sums[i];
        __syncthreads();
        const int own = threadIdx.x;  // the column of the strip that this thread finishes
        if (own < STRIP && left + own < columns) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += scratch[w * STRIP + own];
            y[part * columns + left + own] = from_float<Y>(total);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums(const Storage* __restrict__ x, Storage* __restrict__ y, long long rows, int columns) {
    __shared__ float scratch[WARPS * WARP * PACK];
    if (in_packs(columns, x)) sum_column_parts<PACK>(x, y, rows, columns, scratch);
    else sum_column_parts<1>(x, y, rows, columns, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    column_parts(const Storage* __restrict__ x, float* __restrict__ partial, long long rows, int columns) {
    __shared__ float scratch[WARPS * WARP * PACK];
    if (in_packs(columns, x)) sum_column_parts<PACK>(x, partial, rows, columns, scratch);
    else sum_column_parts<1>(x, partial, rows, columns, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_column_parts(const float* __restrict__ partial, Storage* __restrict__ y, long long parts, int columns) {
    __shared__ float scratch[WARPS * WARP];
    sum_column_parts<1>(partial, y, parts, columns, scratch);
}
