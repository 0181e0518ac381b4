// One access pattern for each kernel; `pattern NAME` marks its line. One warp.

#define KERNEL(name) extern "C" __global__ void name(const float* x, float* y)

KERNEL(contiguous) {
    y[threadIdx.x] = x[threadIdx.x];  // pattern contiguous
}

KERNEL(strided) {
    y[threadIdx.x] = x[8 * threadIdx.x];  // pattern strided
}

KERNEL(shifted) {
    y[threadIdx.x] = x[threadIdx.x + 1];  // pattern shifted
}

KERNEL(broadcast) {
    y[threadIdx.x] = x[0];  // pattern broadcast
}

KERNEL(vectors) {
    const float4 v = reinterpret_cast<const float4*>(x)[threadIdx.x];  // pattern vectors
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

KERNEL(columns) {
    __shared__ float tile[32][32];
    for (int row = 0; row < 32; row++) tile[row][threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    float sum = 0;
    for (int column = 0; column < 32; column++) sum += tile[threadIdx.x][column];  // pattern columns
    y[threadIdx.x] = sum;
}

KERNEL(padded_columns) {
    __shared__ float tile[32][33];
    for (int row = 0; row < 32; row++) tile[row][threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    float sum = 0;
    for (int column = 0; column < 32; column++) sum += tile[threadIdx.x][column];  // pattern padded_columns
    y[threadIdx.x] = sum;
}

KERNEL(shared_vectors) {
    __shared__ float4 tile[32];
    tile[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];  // pattern shared_vectors
    __syncwarp();
    y[threadIdx.x] = tile[31 - threadIdx.x].x;
}
