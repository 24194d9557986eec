#include "low_rank_conv_emulated.h"

#include <stdexcept>

#include "low_rank_conv_kernel.cuh"

namespace shrank {
namespace {

std::vector<emulator::Buffer> buffers_of(const LowRankConvParams& p) {
  const int64_t N = int64_t{p.N} * p.up_groups, R = int64_t{p.R} * p.up_groups;
  const ConvWindow& w = p.window;
  const int64_t images = p.M / (int64_t{w.out[0]} * w.out[1] * w.out[2]);
  std::vector<emulator::Buffer> buffers;
  const auto add = [&](const char* name, const void* base, int64_t rows, int64_t columns, bool writable) {
    const auto size = static_cast<std::size_t>(rows * columns * bytes(p.dtype));
    if (base) buffers.push_back({name, base, size, writable, true});
  };
  add("x", p.x, images * w.in[0] * w.in[1] * w.in[2], p.channels, false);
  add("down", p.down, R, p.K, false);
  add("up", p.up, N, p.R, false);
  add("bias", p.bias, 1, N, false);
  add("residual", p.residual, p.M, N, false);
  add("h", p.h, p.M, R, true);
  add("y", p.y, p.M, N, true);
  return buffers;
}

template <typename T>
emulator::Result emulate(const LowRankConvParams& params, const ConvGrid& grid, const emulator::Options& options) {
  const emulator::Index3 blocks{static_cast<unsigned>(grid.blocks_m),
                                static_cast<unsigned>(grid.blocks_n * params.up_groups), 1};
  emulator::Result result;
  const bool found = with_conv_kernel<T>(grid.tile, [&](auto kernel) {
    result = emulator::launch<typename decltype(kernel)::type>("low_rank_conv", blocks, params, buffers_of(params),
                                                               options);
  });
  if (!found) throw std::invalid_argument("no low_rank_conv kernel has this tile");
  return result;
}

}  // namespace

emulator::Result emulate_low_rank_conv(const LowRankConvParams& params, const ConvGrid& grid,
                                       const emulator::Options& options) {
  if (params.dtype == Dtype::bfloat16) return emulate<arch::bfloat16>(params, grid, options);
  if (params.dtype == Dtype::float16) return emulate<arch::float16>(params, grid, options);
  throw std::invalid_argument("low_rank_conv takes float16 and bfloat16");
}

}  // namespace shrank
