// The backward kernels on a CPU, watched by the emulator.
#pragma once

#include "../emulator/launch.h"
#include "expand_backward.h"

namespace shrank {

// As launch_expand_backward with `dependent`. Throws std::invalid_argument if the tile is not one that is compiled.
emulator::Result emulate_expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid,
                                         const emulator::Options& options);

}  // namespace shrank
