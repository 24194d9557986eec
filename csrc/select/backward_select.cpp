#include "backward_select.h"

#include <algorithm>

#include "cost.h"
#include "integers.h"
#include "kernel_cost.h"
#include "linear_cost.h"
#include "linear_grid.h"
#include "tile_cost.h"

namespace shrank {
namespace {

double microseconds(const LinearGrid& grid, const LinearProblem& p, const Device& d) {
  const LinearTile& tile = grid.tile;
  const double M = real(p.M), N = real(p.N), R = real(p.ranks()), width = bytes(p.dtype);
  const double tiles = real(ceil_div(ceil_div(p.N, tile.block_n()), grid.blocks_n));  // of a block that has most
  Phase load;
  if (tile.holds_h()) load = load_step(tile) * (tile.pairs() * tile.h_panels());
  load.l2_bytes = tile.holds_h() ? width * tile.block_m * R : 0;
  load.dram_bytes = width * tile.block_m * R;
  const Phase up = up_steps(tile, tiles, real(p.most_rank()), width);
  Phase end = backward_end_of(tile, p) * tiles;
  end.wait_us = tiles * kL2LatencyUs;  // for the gradient, which has been asked for before the products
  const double sums = tile.pairs() * 2 * 4 * real(backward_sum_rows(grid)) * N;  // written, and read to be added up
  const Launch launch{grid.blocks_m * grid.blocks_n, tile.threads(), tile.expand_bytes(),
                      width * (M * R + real(p.up_rows()) * R + bias_numbers(p) + (1 + tile.pairs()) * M * N) + sums};
  return kernel_us(launch, {{0, 0, 0, 0, 0, kDramLatencyUs}, load, up, end}, d);
}

// Calls visit with each tile that is compiled for a problem's pairs.
template <typename Visit> void for_each_tile(const LinearProblem& p, const Visit& visit) {
  if (p.gate_R) std::for_each(kGatedBackwardTiles.begin(), kGatedBackwardTiles.end(), visit);
  else if (p.pivoted) std::for_each(kPivotedBackwardTiles.begin(), kPivotedBackwardTiles.end(), visit);
  else std::for_each(kBackwardTiles.begin(), kBackwardTiles.end(), visit);
}

const char* why_not(const LinearTile& tile, const LinearProblem& p, const Device& d) {
  if (tile.holds_h() && tile.max_rank < p.most_rank()) return "R is above the tile's rank";
  if (tile.expand_bytes() > d.smem_per_block) return "the tile needs more shared memory than a block has here";
  return nullptr;
}

namespace fused {

const char* why_not(const LinearProblem& p, const Device& d) { return linear_why_not(p, d, false); }

PlannedGrid grid(const LinearProblem& p, const Device& d) {
  PlannedGrid best{};
  for_each_tile(p, [&](const LinearTile& tile) {
    if (shrank::why_not(tile, p, d)) return;
    for (int blocks_n = 1; blocks_n <= std::min<int64_t>(kMaxShares, ceil_div(p.N, tile.block_n())); blocks_n *= 2) {
      const LinearGrid grid = linear_grid_of(p, tile, blocks_n);
      const double cost = shrank::microseconds(grid, p, d);
      if (best.grid.blocks_n == 0 || cost < best.microseconds) best = {grid, cost};
    }
  });
  return best;
}

double microseconds(const LinearProblem& p, const Device& d) { return grid(p, d).microseconds; }

constexpr const char* kReason = "one launch from h: the pre-activation is never in memory";

}  // namespace fused

namespace gemm_epilogue {

const char* why_not(const LinearProblem&, const Device&) { return nullptr; }

// The pass reads the pre-activation and the gradient, and writes one. Of a gated layer, the gate is opened as well, and
// PyTorch multiplies what meets gate and value.
double microseconds(const LinearProblem& p, const Device& d) {
  if (p.gate_R) return microseconds(p.gate(), d) + microseconds(p.value(), d) + pass_us(p, d, 2) + pass_us(p, d, 3);
  return expand_gemm_us(p, d) + pass_us(p, d, 3);
}

constexpr const char* kReason = "the pre-activation by cuBLAS, then one pass of ours over it";

}  // namespace gemm_epilogue

// In the order of the enum.
constexpr std::array<Way<BackwardKernel, LinearProblem>, kBackwardKernelCount> kWays{{
    {BackwardKernel::fused, "fused", fused::why_not, fused::microseconds, fused::kReason},
    {BackwardKernel::gemm_epilogue, "gemm_epilogue", gemm_epilogue::why_not, gemm_epilogue::microseconds,
     gemm_epilogue::kReason, false},
}};

}  // namespace

std::string_view name_of(BackwardKernel kernel) { return kWays[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate<BackwardKernel>, kBackwardKernelCount> backward_candidates(const LinearProblem& p,
                                                                                const Device& d) {
  return candidates_of(kWays, p, d);
}

BackwardChoice choose_backward(const LinearProblem& p, const Device& d) {
  const auto [way, predicted] = choose(kWays, p, d);
  BackwardChoice choice{way.kernel, predicted, way.reason, {}};
  if (choice.kernel == BackwardKernel::fused) choice.grid = fused::grid(p, d).grid;
  return choice;
}

const BackwardChoice& recall_backward(const LinearProblem& p, const Device& d) {
  thread_local Memory<LinearProblem, BackwardChoice> memory;
  return memory.recall(p, p.mix(), d, choose_backward);
}

BackwardChoice backward_named(const LinearProblem& p, const Device& d, std::string_view kernel,
                              const std::vector<int64_t>& grid) {
  const auto& way = way_named(kWays, kernel, p, d);
  BackwardChoice choice{way.kernel, way.microseconds(p, d), "asked for", {}};
  if (choice.kernel != BackwardKernel::fused) {
    if (!grid.empty()) throw std::invalid_argument(std::string(kernel) + " has no grid");
    return choice;
  }
  choice.grid = fused::grid(p, d).grid;
  if (grid.empty()) return choice;
  const NamedGrid named(grid, p.form());
  bool compiled = false;
  for_each_tile(p, [&](const LinearTile& tile) { compiled = compiled || tile == named.tile; });
  if (!compiled) throw std::invalid_argument("fused: no kernel is compiled for this tile");
  if (const char* reason = why_not(named.tile, p, d)) throw std::invalid_argument(std::string("fused: ") + reason);
  if (named.shares < 1 || named.shares > kMaxShares) throw std::invalid_argument(std::string("fused: ") + kWrongShares);
  choice.grid = linear_grid_of(p, named.tile, static_cast<int>(named.shares));
  return choice;
}

}  // namespace shrank
