// softmax over the rows of a matrix, a block for each row; load, store and the reductions are of gpu_common.cuh.
#include "gpu_common.cuh"

constexpr int BLOCK = 128;

extern "C" __global__ void __launch_bounds__(BLOCK)
    block_softmax(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[BLOCK / WARP];  // a number of each warp

    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        Storage* to = y + row * columns;

        float top = __int_as_float(0xff800000);  // minus infinity
        for (int c = threadIdx.x; c < columns; c += BLOCK) top = fmaxf(top, load(from + c));
        top = block_max(top, scratch);

        float total = 0;
        for (int c = threadIdx.x; c < columns; c += BLOCK) total += expf(load(from + c) - top);
        total = block_sum(total, scratch);

        for (int c = threadIdx.x; c < columns; c += BLOCK) store(to + c, expf(load(from + c) - top) / total);
    }
}
