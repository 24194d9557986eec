#include "linear_grid.h"

#include <algorithm>

#include "cheapest.h"
#include "cost.h"
#include "integers.h"
#include "kernel_cost.h"
#include "tile_cost.h"

namespace shrank {
namespace {

constexpr int kMaxRank = 256;  // of an h that a block holds

bool fits(const LinearTile& tile, const Device& d) { return tile.shared_bytes() <= d.smem_per_block; }

// Calls visit with each tile that is compiled for a problem's pairs.
template <typename Visit> void for_each_tile(const LinearProblem& p, const Visit& visit) {
  if (p.gate_R) std::for_each(kGatedTiles.begin(), kGatedTiles.end(), visit);
  else if (p.pivoted) std::for_each(kPivotedTiles.begin(), kPivotedTiles.end(), visit);
  else std::for_each(kLinearTiles.begin(), kLinearTiles.end(), visit);
}

// The smallest rank that is compiled and holds the problem's: a larger one would only multiply zeros.
int rank_held(const LinearProblem& p) {
  int least = 0;
  for_each_tile(p, [&](const LinearTile& tile) {
    if (tile.max_rank >= p.most_rank() && (least == 0 || tile.max_rank < least)) least = tile.max_rank;
  });
  return least;
}

bool suits(const LinearTile& tile, const LinearProblem& p, const Device& d, bool fused) {
  return (tile.holds_h() ? tile.max_rank == rank_held(p) : !fused) && fits(tile, d);
}

double microseconds(const LinearGrid& grid, const LinearProblem& p, const Device& d, bool fused) {
  const LinearTile& tile = grid.tile;
  const double M = real(p.M), K = real(p.K), N = real(p.N), R = real(p.ranks()), width = bytes(p.dtype);
  const double tiles = real(ceil_div(ceil_div(p.N, tile.block_n()), grid.blocks_n));  // of a block that has most
  const double down_steps = fused ? real(tile.pairs() * ceil_div(p.K, LinearTile::kPanel)) : 0;

  Phase down = down_step(tile) * down_steps;
  if (!fused && tile.holds_h()) down = load_step(tile) * (tile.pairs() * tile.h_panels());
  const Phase rounding = fused ? rounding_of_h(tile) * tile.pairs() : Phase{};
  down.l2_bytes = width * (fused ? (tile.pairs() * tile.block_m + R) * K : tile.holds_h() ? tile.block_m * R : 0);
  down.dram_bytes = width * tile.block_m * (fused ? K : R);  // x is in L2 when a second pair reads it
  down.wait_us = down_steps * kDramLatencyUs / (tile.down_stages() - 1);

  const Phase up = up_steps(tile, tiles, real(p.most_rank()), width);
  const Phase end = end_of(tile, p) * tiles;
  const double read = (fused ? M * K + R * K : M * R) + real(p.up_numbers()) + bias_numbers(p) +
                      (p.residual ? M * N : 0);
  const double moved = read + M * N + (fused && p.training ? M * R : 0);
  const Launch launch{grid.blocks_m * grid.blocks_n, tile.threads(), tile.shared_bytes(), moved * width};
  return kernel_us(launch, {{0, 0, 0, 0, 0, kDramLatencyUs}, down, rounding, up, end}, d);
}

}  // namespace

const char* linear_why_not(const LinearProblem& p, const Device& d, bool fused) {
  if (p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16)
    return "the tensor core kernels take bfloat16 and float16";
  if (d.arch < 80) return "the tensor core kernels need compute capability 8.0";
  if (p.M == 0 || p.K == 0 || p.N == 0 || p.R == 0) return "a size is zero";  // a gate_R of 0 is no gate
  if (p.M >= int64_t{1} << 31 || p.K >= int64_t{1} << 31 || p.N >= int64_t{1} << 31) return "a size is 2^31 or more";
  if (p.K % 8 || p.N % 8 || p.R % 8 || p.gate_R % 8)
    return "K, N and R must be multiples of 8: rows are read 16 bytes at a time";
  if (!p.aligned) return "a tensor has gaps or does not begin at a multiple of 16 bytes";
  if (fused && p.most_rank() > kMaxRank) return "R is above 256: h does not fit in shared memory";
  bool any = false;
  for_each_tile(p, [&](const LinearTile& tile) { any = any || suits(tile, p, d, fused); });
  return any ? nullptr : "the tiles for this R need more shared memory than a block has here";
}

const char* linear_why_not(const LinearProblem& p, const Device& d, bool fused, const LinearTile& tile,
                           int64_t shares) {
  if (const char* why_not = linear_why_not(p, d, fused)) return why_not;
  bool compiled = false;
  for_each_tile(p, [&](const LinearTile& known) { compiled = compiled || known == tile; });
  if (!compiled) return "no kernel is compiled for this tile";
  if (!tile.holds_h() && fused) return "a tile that streams h cannot compute it";
  if (tile.holds_h() && tile.max_rank < p.most_rank()) return "R is above the tile's rank";
  if (!fits(tile, d)) return "the tile needs more shared memory than a block has here";
  if (shares < 1 || shares > kMaxShares) return kWrongShares;
  return nullptr;
}

LinearGrid linear_grid_of(const LinearProblem& p, const LinearTile& tile, int shares) {
  return {tile, ceil_div(p.M, tile.block_m), shares};
}

namespace {

// Calls visit with every grid, what it costs for this problem, and for training and inference together.
template <typename Visit>
void for_each_grid(const LinearProblem& p, const Device& d, bool fused, const Visit& visit) {
  LinearProblem training = p, inference = p;
  training.training = true;
  inference.training = false;
  for_each_tile(p, [&](const LinearTile& tile) {
    if (!suits(tile, p, d, fused)) return;
    const int64_t tiles_n = ceil_div(p.N, tile.block_n());
    for (int blocks_n = 1; blocks_n <= std::min<int64_t>(kMaxShares, tiles_n); blocks_n *= 2) {
      const LinearGrid grid = linear_grid_of(p, tile, blocks_n);
      const double costs[] = {microseconds(grid, inference, d, fused), microseconds(grid, training, d, fused)};
      visit(PlannedGrid{grid, costs[p.training]}, costs[0] + costs[1]);
    }
  });
}

}  // namespace

PlannedGrid linear_grid(const LinearProblem& p, const Device& d, bool fused) {
  PlannedGrid best{};
  double least = 0;
  for_each_grid(p, d, fused, [&](const PlannedGrid& planned, double both) {
    if (best.grid.blocks_n == 0 || both < least) best = planned, least = both;
  });
  return best;
}

std::vector<PlannedGrid> linear_grids(const LinearProblem& p, const Device& d, bool fused, std::size_t most) {
  std::vector<std::pair<double, PlannedGrid>> all;
  for_each_grid(p, d, fused, [&](const PlannedGrid& planned, double both) { all.emplace_back(both, planned); });
  return cheapest(std::move(all), most);
}

}  // namespace shrank
