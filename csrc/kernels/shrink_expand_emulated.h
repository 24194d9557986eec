// The kernels for a few rows on a CPU, watched by the emulator.
#pragma once

#include "../emulator/launch.h"
#include "shrink_expand.h"

namespace shrank {

// As launch_shrink_expand with `dependent`: one launch after the other, the problems of both. Throws
// std::invalid_argument if the tile is not one that is compiled.
emulator::Result emulate_shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile,
                                       const emulator::Options& options);

// One of them.
emulator::Result emulate_shrink(const ShrinkExpandParams& params, const ShrinkExpandTile& tile,
                                const emulator::Options& options);
emulator::Result emulate_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile,
                                const emulator::Options& options);

}  // namespace shrank
