#include "cuda/nmf/iterations_backward.cuh"

template void factorizer::cuda::iterations_backward<5>(const Launcher&, const DeviceWindows&,
                                                       const NMFOptions&, u32, i64, const Map&, const Factor&,
                                                       const Factor&, const Map&, const float*, const float*,
                                                       const Map&, float*, float*, float*);
