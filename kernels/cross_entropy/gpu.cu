// Cross entropy of logits (rows, columns) with its gradient, which may overwrite the logits.
//
// count_kept           how many labels are not ignored. Counted on the device: a captured graph is replayed on other
//                      labels. One block; nothing beside what follows.
// cross_entropy_rows   a block for each row. The row is read from memory once, for its maximum and the sum of its
//                      exponentials together (Milakov and Gimelshein 2018), and again from L2 for the gradient.
//                      Bound by memory: a read and a write of the logits. Rows of 30522 that follow one another lie
//                      mostly off the 16-byte grid: single elements up to the first whole pack, packs from there.
// mean_loss            the losses, added by one block in a fixed order.
#include "gpu_common.cuh"

constexpr int ROW_THREADS = 512;
constexpr int SUM_THREADS = 1024;

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    count_kept(const int* __restrict__ labels, int* __restrict__ kept, int rows, int ignored) {
    int count = 0;
    for (int first = 0; first < rows; first += SUM_THREADS) {  // every thread takes part in each vote
        const int row = first + threadIdx.x;
        count += __syncthreads_count(row < rows && labels[row] != ignored);
    }
    if (threadIdx.x == 0) *kept = count;
}

// What the mean divides by: 1 where every row is ignored.
__device__ __forceinline__ float divisor(const int* kept) { return *kept > 0 ? static_cast<float>(*kept) : 1.0f; }

// Elements before the first whole pack of a row, which must lie alike in both arrays; all of them where it does not.
__device__ __forceinline__ int singles_before_packs(const Storage* z, const Storage* out, int columns) {
    const int offset = static_cast<int>(reinterpret_cast<unsigned long long>(z) % 16);
    if (offset != static_cast<int>(reinterpret_cast<unsigned long long>(out) % 16)) return columns;
    const int singles = (16 - offset) % 16 / static_cast<int>(sizeof(Storage));
    return singles < columns ? singles : columns;
}

// Every element of a row, by the same thread each time: `pack(j)` for PACK of them from j on, `single(j)` for the rest.
template <class Pack, class Single>
__device__ __forceinline__ void walk(int before, int columns, Pack pack, Single single) {
    const int packs = (columns - before) / PACK;
    const int singles = columns - packs * PACK;
    for (int i = threadIdx.x; i < packs; i += ROW_THREADS) pack(before + i * PACK);
    for (int i = threadIdx.x; i < singles; i += ROW_THREADS) single(i < before ? i : i + packs * PACK);
}

// `logits` is null where `dlogits` holds them: each thread reads an element again just before it overwrites it. Rows of
// either begin `pitch` elements after one another.
extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    cross_entropy_rows(const Storage* logits, Storage* dlogits, const int* __restrict__ labels,
                       const int* __restrict__ kept, float* __restrict__ losses, int rows, int columns, int pitch,
                       int ignored) {
    __shared__ float scratch[ROW_THREADS / WARP];
    const float count = divisor(kept);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        Storage* out = dlogits + static_cast<long long>(row) * pitch;
        const Storage* z = logits == nullptr ? out : logits + static_cast<long long>(row) * pitch;
        const int before = singles_before_packs(z, out, columns);
        const int label = labels[row];
        if (label == ignored) {
            const float zeros[PACK] = {};
            walk(before, columns, [&](int j) { store_pack(out + j, zeros); }, [&](int j) { store(out + j, 0.0f); });
            if (threadIdx.x == 0) losses[row] = 0;
            continue;
        }

        const float chosen = load(z + label);
        float top = fmaxf(load(z), -3.402823466e38f), total = 0;  // the largest so far (finite), and the sum of exp(z - top)
        walk(
            before, columns,
            [&](int j) {
                float values[PACK];
                load_pack(z + j, values);
                float larger = top;
#pragma unroll
                for (int i = 0; i < PACK; ++i) larger = fmaxf(larger, values[i]);
                total *= expf(top - larger);
                top = larger;
#pragma unroll
                for (int i = 0; i < PACK; ++i) total += expf(values[i] - top);
            },
            [&](int j) {
                const float value = load(z + j);
                const float larger = fmaxf(top, value);
                total = total * expf(top - larger) + expf(value - larger);
                top = larger;
            });
        const float row_top = block_max(top, scratch);
        const float row_total = block_sum(total * expf(top - row_top), scratch);
        if (threadIdx.x == 0) losses[row] = logf(row_total) + (row_top - chosen);

        const float scale = 1.0f / (row_total * count);
        const float hit = 1.0f / count;
        auto gradient = [&](float value, int j) { return expf(value - row_top) * scale - (j == label ? hit : 0.0f); };
        walk(
            before, columns,
            [&](int j) {
                float values[PACK];
                load_pack(z + j, values);
#pragma unroll
                for (int i = 0; i < PACK; ++i) values[i] = gradient(values[i], j + i);
                store_pack(out + j, values);
            },
            [&](int j) { store(out + j, gradient(load(z + j), j)); });
    }
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    mean_loss(const float* __restrict__ losses, const int* __restrict__ kept, float* __restrict__ loss, int rows) {
    __shared__ float scratch[SUM_THREADS / WARP];
    float total = 0;
    for (int row = threadIdx.x; row < rows; row += SUM_THREADS) total += losses[row];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *loss = total / divisor(kept);
}
