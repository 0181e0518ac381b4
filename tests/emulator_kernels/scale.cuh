// A header that right.cu includes.
#pragma once

#ifndef SCALE
#define SCALE 2
#endif

// Wrong where it is called: nothing waits for `tile` to be written.
__device__ __forceinline__ float neighbour(float* tile, float x) {
    tile[threadIdx.x] = x;
    return tile[threadIdx.x ^ 1];  // fault neighbour
}
