// The convolution kernels on a CPU, watched by the emulator.
#pragma once

#include "../emulator/launch.h"
#include "low_rank_conv.h"

namespace shrank {

// As launch_low_rank_conv with `dependent`. Throws std::invalid_argument if the tile is not one that is compiled.
emulator::Result emulate_low_rank_conv(const LowRankConvParams& params, const ConvGrid& grid,
                                       const emulator::Options& options);

}  // namespace shrank
