// One file for each element type, so that ninja compiles them side by side.
#pragma once

#include "launch.cuh"
#include "low_rank_conv_kernel.cuh"

namespace shrank {

template <typename T>
void launch_conv(const LowRankConvParams& params, const ConvGrid& grid, bool dependent, void* stream) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n * params.up_groups));
  const bool found = with_conv_kernel<T>(grid.tile, [&](auto kernel) {
    launch<typename decltype(kernel)::type>("low_rank_conv", blocks, params, dependent, stream);
  });
  if (!found) throw std::runtime_error("shrank: low_rank_conv was not compiled for the tile that select chose");
}

extern template void launch_conv<arch::bfloat16>(const LowRankConvParams&, const ConvGrid&, bool, void*);
extern template void launch_conv<arch::float16>(const LowRankConvParams&, const ConvGrid&, bool, void*);

}  // namespace shrank
