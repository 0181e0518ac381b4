#error "cooperative groups are not emulated: use __syncthreads, __syncwarp and the shuffles"
