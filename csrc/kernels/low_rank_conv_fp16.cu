#include "low_rank_conv_launch.cuh"

template void shrank::launch_conv<shrank::arch::float16>(const LowRankConvParams&, const ConvGrid&, bool, void*);
