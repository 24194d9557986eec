#include "low_rank_linear_emulated.h"

#include <stdexcept>

#include "../select/with_tile.h"
#include "low_rank_linear.cuh"

namespace shrank {
namespace {

std::vector<emulator::Buffer> buffers_of(const LowRankLinearParams& p, const LinearTile& tile) {
  const auto size = [&](int64_t rows, int64_t columns) {
    return static_cast<std::size_t>(rows * columns * bytes(p.dtype));
  };
  std::vector<emulator::Buffer> buffers;
  const auto add = [&](const char* name, const void* base, std::size_t bytes, bool writable) {
    if (base) buffers.push_back({name, base, bytes, writable, true});
  };
  if (p.x) add("x", p.x, size(p.M, p.K), false);
  for (int i = 0; i < tile.pairs(); i++) {
    const Pair& of = p.pair[i];
    if (p.x) add("down", of.down, size(of.R, p.K), false);
    const int others = tile.form == Form::pivoted ? p.N - of.R : p.N;
    add("up", of.up, size(others, of.R), false);
    add("bias", of.bias, size(1, others), false);
    add("pivot_bias", of.pivot_bias, size(1, of.R), false);
    add("order", of.order, p.N * sizeof(int32_t), false);
    add("h", of.h, size(p.M, of.R), p.x != nullptr);
  }
  add("residual", p.residual, size(p.M, p.N), false);
  add("y", p.y, size(p.M, p.N), true);
  return buffers;
}

template <typename T, const auto& TILES>
emulator::Result emulate(const LowRankLinearParams& params, const LinearGrid& grid, const emulator::Options& options) {
  const emulator::Index3 blocks{static_cast<unsigned>(grid.blocks_m), static_cast<unsigned>(grid.blocks_n), 1};
  emulator::Result result;
  const bool found = with_tile<TILES>(grid.tile, [&](auto tile) {
    result = emulator::launch<LowRankLinear<T, tile().block_m, tile().max_rank, number_of(tile().form)>>(
        "low_rank_linear", blocks, params, buffers_of(params, tile()), options);
  });
  if (!found) throw std::invalid_argument("no low_rank_linear kernel has this tile");
  return result;
}

}  // namespace

emulator::Result emulate_low_rank_linear(const LowRankLinearParams& params, const LinearGrid& grid,
                                         const emulator::Options& options) {
  const auto emulate_on = [&](auto element) {
    using T = decltype(element);
    switch (grid.tile.form) {
      case Form::plain: return emulate<T, kLinearTiles>(params, grid, options);
      case Form::gated: return emulate<T, kGatedTiles>(params, grid, options);
      case Form::pivoted: return emulate<T, kPivotedTiles>(params, grid, options);
      case Form::gated_pivoted: break;
    }
    throw std::invalid_argument("no low_rank_linear kernel has this form");
  };
  if (params.dtype == Dtype::bfloat16) return emulate_on(arch::bfloat16{});
  if (params.dtype == Dtype::float16) return emulate_on(arch::float16{});
  throw std::invalid_argument("low_rank_linear takes float16 and bfloat16");
}

}  // namespace shrank
