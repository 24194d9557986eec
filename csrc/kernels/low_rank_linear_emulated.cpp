#include "low_rank_linear_emulated.h"

#include <stdexcept>

#include "../select/with_tile.h"
#include "low_rank_linear.cuh"

namespace shrank {
namespace {

std::vector<emulator::Buffer> buffers_of(const LowRankLinearParams& p) {
  const auto size = [&](int64_t rows, int64_t columns) {
    return static_cast<std::size_t>(rows * columns * bytes(p.dtype));
  };
  std::vector<emulator::Buffer> buffers;
  const auto add = [&](const char* name, const void* base, std::size_t bytes, bool writable) {
    if (base) buffers.push_back({name, base, bytes, writable, true});
  };
  if (p.x) {
    add("x", p.x, size(p.M, p.K), false);
    add("down", p.down, size(p.R, p.K), false);
  }
  add("up", p.up, size(p.N, p.R), false);
  add("bias", p.bias, size(1, p.N), false);
  add("residual", p.residual, size(p.M, p.N), false);
  add("h", p.h, size(p.M, p.R), p.x != nullptr);
  add("y", p.y, size(p.M, p.N), true);
  return buffers;
}

template <typename T>
emulator::Result emulate(const LowRankLinearParams& params, const LinearGrid& grid, const emulator::Options& options) {
  const emulator::Index3 blocks{static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n), 1};
  emulator::Result result;
  const bool found = with_tile<kLinearTiles>(grid.tile, [&](auto tile) {
    result = emulator::launch<LowRankLinear<T, tile().block_m, tile().max_rank>>("low_rank_linear", blocks, params,
                                                                                 buffers_of(params), options);
  });
  if (!found) throw std::invalid_argument("no low_rank_linear kernel has this tile");
  return result;
}

}  // namespace

emulator::Result emulate_low_rank_linear(const LowRankLinearParams& params, const LinearGrid& grid,
                                         const emulator::Options& options) {
  if (params.dtype == Dtype::bfloat16) return emulate<arch::bfloat16>(params, grid, options);
  if (params.dtype == Dtype::float16) return emulate<arch::float16>(params, grid, options);
  throw std::invalid_argument("low_rank_linear takes float16 and bfloat16");
}

}  // namespace shrank
