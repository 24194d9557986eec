#include "expand_backward_emulated.h"

#include <stdexcept>

#include "../select/with_tile.h"
#include "expand_backward.cuh"

namespace shrank {
namespace {

std::vector<emulator::Buffer> buffers_of(const ExpandBackwardParams& p, const LinearGrid& grid) {
  std::vector<emulator::Buffer> buffers;
  const auto add = [&](const char* name, const void* base, int64_t rows, int64_t columns, int width, bool writable) {
    if (base) buffers.push_back({name, base, static_cast<std::size_t>(rows * columns * width), writable, true});
  };
  const int width = bytes(p.dtype);
  add("h", p.h, p.M, p.R, width, false);
  add("up", p.up, p.N, p.R, width, false);
  add("bias", p.bias, 1, p.N, width, false);
  add("grad", p.grad, p.M, p.N, width, false);
  add("dz", p.dz, p.M, p.N, width, true);
  add("sums", p.sums, backward_sum_rows(grid), p.N, sizeof(float), true);
  return buffers;
}

template <typename T>
emulator::Result emulate(const ExpandBackwardParams& params, const LinearGrid& grid, const emulator::Options& options) {
  const emulator::Index3 blocks{static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n), 1};
  emulator::Result result;
  const bool found = with_tile<kBackwardTiles>(grid.tile, [&](auto tile) {
    result = emulator::launch<ExpandBackward<T, tile().block_m, tile().max_rank>>("expand_backward", blocks, params,
                                                                                  buffers_of(params, grid), options);
  });
  if (!found) throw std::invalid_argument("no expand_backward kernel has this tile");
  return result;
}

}  // namespace

emulator::Result emulate_expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid,
                                         const emulator::Options& options) {
  if (params.dtype == Dtype::bfloat16) return emulate<arch::bfloat16>(params, grid, options);
  if (params.dtype == Dtype::float16) return emulate<arch::float16>(params, grid, options);
  throw std::invalid_argument("expand_backward takes float16 and bfloat16");
}

}  // namespace shrank
