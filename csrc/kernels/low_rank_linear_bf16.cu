#include "low_rank_linear_launch.cuh"

template void shrank::launch_linear<shrank::arch::bfloat16>(const LowRankLinearParams&, const LinearGrid&, bool, void*);
