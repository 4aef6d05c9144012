#include "factorize_backward.cuh"

template void factorizer::cuda::factorize_backward<1>(const Launcher&, const Cut&, const Options&, u32, i64,
                                                      const Map&, const Factor&, const Factor&, const Map&,
                                                      const float*, const float*, const Map&, float*, float*,
                                                      float*);
