// Kernels that end the process, or would never end, when nobody watches their accesses.

extern "C" __global__ void writes_to_null(float* y, int zero) {
    float* nowhere = zero ? y : nullptr;
    nowhere[threadIdx.x] = 1;  // crash writes_to_null
}

extern "C" __global__ void divides_by_zero(float* y, int zero) {
    y[threadIdx.x] = float(int(threadIdx.x) / zero);  // crash divides_by_zero
}

extern "C" __global__ void never_ends(float* y, int zero) {
    volatile float* flag = y;
    while (*flag != 1) {
    }
}

extern "C" __global__ void ones(float* y, int zero) {
    y[threadIdx.x] = 1;  // stop ones
}

__device__ int depth(int n) {
    volatile int kept = n;
    return depth(n + 1) + kept;
}

extern "C" __global__ void recurses(float* y, int zero) {
    y[threadIdx.x] = float(depth(zero));
}

extern "C" __global__ void reads_and_recurses(float* y, int zero) {
    const float before = y[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = before + float(depth(zero));
}
