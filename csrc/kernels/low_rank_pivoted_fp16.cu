#include "low_rank_linear_launch.cuh"

template shrank::LaunchLinear shrank::launch_linear<shrank::arch::float16, shrank::kPivotedTiles>;
