// What differs between the devices that the ops run on.
#pragma once

#include "../kernels/epilogue.h"
#include "../kernels/expand_backward.h"
#include "../kernels/low_rank_conv.h"
#include "../kernels/low_rank_linear.h"
#include "../kernels/shrink_expand.h"

namespace shrank {

// `index` is the device's; `select` is told of it.
struct Runtime {
  const Device& (*device)(int index);
  bool (*capturing)(int index);  // whether the current stream records a graph
  void (*epilogue)(const EpilogueParams& params, const EpilogueTile& tile, int index);
  void (*epilogue_backward)(const EpilogueBackwardParams& params, const EpilogueTile& tile, int index);
  void (*linear)(const LowRankLinearParams& params, const LinearGrid& grid, const Device& device, int index);
  void (*shrink_expand)(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, const Device& device,
                        int index);
  void (*conv)(const LowRankConvParams& params, const ConvGrid& grid, const Device& device, int index);
  void (*expand_backward)(const ExpandBackwardParams& params, const LinearGrid& grid, const Device& device, int index);
};

}  // namespace shrank
