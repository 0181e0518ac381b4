// Cross entropy over the rows of logits, a block for each row: `right...`, and kernels of which each has one mistake.
#include "gpu_common.cuh"

constexpr int BLOCK = 64;
constexpr int WARPS = BLOCK / WARP;
constexpr int WIDE = 1024;     // threads of the kernels that make one number
constexpr int CLASSES = 4096;  // that fit into shared memory
constexpr int IGNORED = -100;

__device__ float minus_infinity() { return __int_as_float(0xff800000); }

struct Row {
    float top, total;  // the largest logit, and the sum of exp(z - top)
};

__device__ Row row_of(const Storage* z, int columns, float* scratch) {
    Row row = {minus_infinity(), 0};
    for (int c = threadIdx.x; c < columns; c += BLOCK) row.top = fmaxf(row.top, load(z + c));
    row.top = block_max(row.top, scratch);
    for (int c = threadIdx.x; c < columns; c += BLOCK) row.total += expf(load(z + c) - row.top);
    row.total = block_sum(row.total, scratch);
    return row;
}

// (softmax(z) - onehot) / count of one row.
__device__ void write_gradient(const Storage* z, Storage* dz, const Row& row, int label, int columns, float count) {
    for (int c = threadIdx.x; c < columns; c += BLOCK) {
        const float p = expf(load(z + c) - row.top) / row.total;
        store(dz + c, (c == label ? p - 1 : p) / count);
    }
}

__device__ void write_zeros(Storage* dz, float* loss, int columns) {
    for (int c = threadIdx.x; c < columns; c += BLOCK) store(dz + c, 0);
    if (threadIdx.x == 0) *loss = 0;
}

// How many labels are not ignored.
__device__ int labels_that_count(const int* labels, int rows, float* scratch) {
    float mine = 0;  // exact: counts below 2^24
    for (int row = threadIdx.x; row < rows; row += blockDim.x) mine += labels[row] != IGNORED;
    return static_cast<int>(block_sum(mine, scratch));
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right(const Storage* __restrict__ z, const int* __restrict__ labels, Storage* __restrict__ dz,
          float* __restrict__ losses, int rows, int columns) {
    __shared__ float scratch[WARPS];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    for (long long r = blockIdx.x; r < rows; r += gridDim.x) {
        const Storage* from = z + r * columns;
        const int label = labels[r];
        if (label == IGNORED) {
            write_zeros(dz + r * columns, losses + r, columns);
            continue;
        }
        const Row row = row_of(from, columns, scratch);
        write_gradient(from, dz + r * columns, row, label, columns, count);
        if (threadIdx.x == 0) losses[r] = logf(row.total) - (load(from + label) - row.top);
    }
}

extern "C" __global__ void __launch_bounds__(WIDE)
    right_mean(const float* __restrict__ losses, const int* __restrict__ labels, float* __restrict__ loss, int rows) {
    __shared__ float scratch[WIDE / WARP];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    float total = 0;
    for (int row = threadIdx.x; row < rows; row += WIDE) total += losses[row];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *loss = total / count;
}

// ------------------------------------------------------------------------------------------------------- wrong rows

// -log p: a probability that vanishes in float32 has a loss without bounds, where the logits are finite.
extern "C" __global__ void __launch_bounds__(BLOCK)
    minus_log_of_probability(const Storage* __restrict__ z, const int* __restrict__ labels, Storage* __restrict__ dz,
                             float* __restrict__ losses, int rows, int columns) {
    __shared__ float scratch[WARPS];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    for (long long r = blockIdx.x; r < rows; r += gridDim.x) {
        const Storage* from = z + r * columns;
        const int label = labels[r];
        if (label == IGNORED) {
            write_zeros(dz + r * columns, losses + r, columns);
            continue;
        }
        const Row row = row_of(from, columns, scratch);
        write_gradient(from, dz + r * columns, row, label, columns, count);
        if (threadIdx.x == 0) losses[r] = -logf(expf(load(from + label) - row.top) / row.total);
    }
}

// The logits of a row are kept in shared memory; classes that do not fit are forgotten.
extern "C" __global__ void __launch_bounds__(BLOCK)
    classes_that_fit(const Storage* __restrict__ z, const int* __restrict__ labels, Storage* __restrict__ dz,
                     float* __restrict__ losses, int rows, int columns) {
    __shared__ float kept[CLASSES];
    __shared__ float scratch[WARPS];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    for (long long r = blockIdx.x; r < rows; r += gridDim.x) {
        const Storage* from = z + r * columns;
        const int label = labels[r];
        if (label == IGNORED) {
            write_zeros(dz + r * columns, losses + r, columns);
            continue;
        }
        Row row = {minus_infinity(), 0};
        for (int c = threadIdx.x; c < columns && c < CLASSES; c += BLOCK) {
            kept[c] = load(from + c);
            row.top = fmaxf(row.top, kept[c]);
        }
        row.top = block_max(row.top, scratch);
        for (int c = threadIdx.x; c < columns && c < CLASSES; c += BLOCK) row.total += expf(kept[c] - row.top);
        row.total = block_sum(row.total, scratch);
        write_gradient(from, dz + r * columns, row, label, columns, count);
        if (threadIdx.x == 0) losses[r] = logf(row.total) - (load(from + label) - row.top);
    }
}

// A class is kept in 16 bits, with a sign.
extern "C" __global__ void __launch_bounds__(BLOCK)
    labels_of_16_bits(const Storage* __restrict__ z, const int* __restrict__ labels, Storage* __restrict__ dz,
                      float* __restrict__ losses, int rows, int columns) {
    __shared__ float scratch[WARPS];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    for (long long r = blockIdx.x; r < rows; r += gridDim.x) {
        const Storage* from = z + r * columns;
        const short label = static_cast<short>(labels[r]);
        if (label < 0) {
            write_zeros(dz + r * columns, losses + r, columns);
            continue;
        }
        const Row row = row_of(from, columns, scratch);
        write_gradient(from, dz + r * columns, row, label, columns, count);
        if (threadIdx.x == 0) losses[r] = logf(row.total) - (load(from + label) - row.top);
    }
}

// The logit of the label is read before anybody asks whether the label counts.
extern "C" __global__ void __launch_bounds__(BLOCK)
    logit_of_ignored_label(const Storage* __restrict__ z, const int* __restrict__ labels, Storage* __restrict__ dz,
                           float* __restrict__ losses, int rows, int columns) {
    __shared__ float scratch[WARPS];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    for (long long r = blockIdx.x; r < rows; r += gridDim.x) {
        const Storage* from = z + r * columns;
        const int label = labels[r];
        const float logit = load(from + label);
        const Row row = row_of(from, columns, scratch);
        if (label == IGNORED) {
            write_zeros(dz + r * columns, losses + r, columns);
            continue;
        }
        write_gradient(from, dz + r * columns, row, label, columns, count);
        if (threadIdx.x == 0) losses[r] = logf(row.total) - (logit - row.top);
    }
}

// ------------------------------------------------------------------------------------------------------- wrong means

// Where no label counts, the mean is 0 / 0.
extern "C" __global__ void __launch_bounds__(WIDE)
    mean_of_none(const float* __restrict__ losses, const int* __restrict__ labels, float* __restrict__ loss, int rows) {
    __shared__ float scratch[WIDE / WARP];
    const float count = labels_that_count(labels, rows, scratch);
    float total = 0;
    for (int row = threadIdx.x; row < rows; row += WIDE) total += losses[row];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *loss = total / count;
}

// Rows that are ignored count in the mean.
extern "C" __global__ void __launch_bounds__(WIDE)
    mean_of_all(const float* __restrict__ losses, const int* __restrict__ labels, float* __restrict__ loss, int rows) {
    __shared__ float scratch[WIDE / WARP];
    float total = 0;
    for (int row = threadIdx.x; row < rows; row += WIDE) total += losses[row];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *loss = total / max(1, rows);
}

// A thread for each row: rows after the last thread are left out of the sum.
extern "C" __global__ void __launch_bounds__(WIDE)
    mean_of_first_rows(const float* __restrict__ losses, const int* __restrict__ labels, float* __restrict__ loss,
                       int rows) {
    __shared__ float scratch[WIDE / WARP];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    const float total = block_sum(static_cast<int>(threadIdx.x) < rows ? losses[threadIdx.x] : 0.0f, scratch);
    if (threadIdx.x == 0) *loss = total / count;
}

// Each row adds its loss when it comes, in no order.
extern "C" __global__ void __launch_bounds__(BLOCK)
    mean_by_atomic_additions(const float* __restrict__ losses, const int* __restrict__ labels,
                             float* __restrict__ loss, int rows) {
    __shared__ float scratch[WARPS];
    const float count = max(1, labels_that_count(labels, rows, scratch));
    for (int row = blockIdx.x * BLOCK + threadIdx.x; row < rows; row += gridDim.x * BLOCK) {
        atomicAdd(loss, losses[row] / count);
    }
}
