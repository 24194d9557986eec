#include "low_rank_conv_launch.cuh"

namespace shrank {

void launch_low_rank_conv(const LowRankConvParams& params, const ConvGrid& grid, bool dependent, void* stream) {
  if (params.M == 0 || params.N == 0) return;
  if (params.dtype == Dtype::bfloat16) return launch_conv<arch::bfloat16>(params, grid, dependent, stream);
  if (params.dtype == Dtype::float16) return launch_conv<arch::float16>(params, grid, dependent, stream);
  throw std::runtime_error("shrank: low_rank_conv takes float16 and bfloat16, not " +
                           std::string(name_of(params.dtype)));
}

}  // namespace shrank
