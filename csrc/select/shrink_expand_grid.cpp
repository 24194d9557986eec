#include "shrink_expand_grid.h"

#include <algorithm>

#include "cheapest.h"
#include "cost.h"
#include "integers.h"
#include "kernel_cost.h"
#include "kernel_slots.h"

namespace shrank {
namespace {

constexpr int kMaxRows = 64, kMaxSplits = 64;
constexpr int64_t kMaxNumber = int64_t{1} << 31;

// From the end of the first kernel to h in the second, which has been waiting for it (programmatic dependent launch):
// assumed.
constexpr double kReleaseUs = 0.7;

bool fits(const ShrinkExpandTile& tile, const LinearProblem& p, const Device& d) {
  return tile.form == p.form() && tile.layers == 1 && p.most_rank() <= ShrinkExpandTile::kMaxRank &&
         tile.expand_bytes(static_cast<int>(p.most_rank())) <= d.smem_per_block &&
         tile.shrink_bytes() <= d.smem_per_block;
}

int64_t chunks_of(int64_t columns) { return ceil_div(columns, ShrinkExpandTile::kChunk); }

// Of a warp, for so many chunks of its rows; `slots` for each 8 rows of x or h that a chunk meets.
Phase stream(const ShrinkExpandTile& tile, double chunks, double warps, double slots) {
  const double eights = tile.tokens / 8.0, batch = tile.shrink_batch();  // of all pairs together
  Phase phase;
  phase.slots = warps * chunks * (kWeightSlots + eights * slots);
  phase.products = warps * chunks * eights * 2 * 16 * 8 * 16;
  phase.dram_bytes = warps * chunks * ShrinkExpandTile::kRows * ShrinkExpandTile::kChunk * 2;
  phase.l2_bytes = phase.dram_bytes;
  phase.wait_us = std::max(1.0, chunks / (2 * batch)) * kDramLatencyUs;
  return phase;
}

int64_t shrink_blocks(const LinearProblem& p) {
  return ShrinkExpandTile::shrink_blocks(p.R) + ShrinkExpandTile::shrink_blocks(p.gate_R);
}

double shrink_us(const LinearProblem& p, const Device& d, const LinearGrid& grid) {
  const ShrinkExpandTile tile = shrink_expand_tile_of(grid);
  constexpr double kWarps = ShrinkExpandTile::kShrinkWarps;
  const double chunks = real(ceil_div(chunks_of(p.K), static_cast<int64_t>(grid.blocks_n * kWarps)));
  Phase weights = stream(tile, chunks, kWarps, kTokenSlots);
  const double rows = std::min<double>(real(p.M), tile.tokens), width = bytes(p.dtype);
  weights.l2_bytes += kWarps * chunks * ShrinkExpandTile::kChunk * rows * width;
  Phase sum;  // of the warps, through shared memory
  sum.slots = kWarps * tile.tokens / 8 * kWarpSumSlots;
  const int64_t blocks = shrink_blocks(p) * grid.blocks_n * grid.blocks_m;
  const double h = real(p.M * p.ranks()) * (grid.blocks_n == 1 ? width : 4.0 * grid.blocks_n);
  return kernel_us(
      {blocks, ShrinkExpandTile::kShrinkThreads, tile.shrink_bytes(), width * real(p.ranks() * p.K + p.M * p.K) + h},
      {weights, sum}, d);
}

double expand_us(const LinearProblem& p, const Device& d, const LinearGrid& grid) {
  const ShrinkExpandTile tile = shrink_expand_tile_of(grid);
  constexpr double kWarps = ShrinkExpandTile::kExpandWarps;
  const double rows = std::min<double>(real(p.M), tile.tokens), width = bytes(p.dtype);
  Phase load;
  load.l2_bytes = rows * real(p.ranks()) * (grid.blocks_n == 1 ? width : 4.0 * grid.blocks_n);
  load.slots = load.l2_bytes / 16 / 32 * kStagingSlots;
  load.wait_us = kL2LatencyUs;
  const Phase weights = stream(tile, real(tile.pairs() * chunks_of(p.most_rank())), kWarps, kStagedTokenSlots);
  Phase end;
  end.slots = kWarps * tile.tokens / 8 * (kTokenEndSlots + activation_slots(p.activation) / 2);
  const int64_t blocks = ShrinkExpandTile::expand_blocks(p.N) * grid.blocks_m;
  const double M = real(p.M), N = real(p.N), R = real(p.ranks());
  const double moved = real(p.up_numbers()) + bias_numbers(p) + M * N * (1 + p.residual) + (p.training ? M * R : 0);
  return kernel_us(
      {blocks, ShrinkExpandTile::kExpandThreads, tile.expand_bytes(static_cast<int>(p.most_rank())), moved * width},
      {load, weights, end}, d);
}

double microseconds(const LinearProblem& p, const Device& d, const LinearGrid& grid) {
  const double shrink = shrink_us(p, d, grid), expand = expand_us(p, d, grid);
  if (d.arch < 90) return shrink + expand;
  // Its launch and its first weights come while the first kernel runs.
  return shrink + kReleaseUs + std::max(0.0, expand - d.node_us - kDramLatencyUs);
}

const char* why_not_any(const LinearProblem& p, const Device& d) {
  if (const char* why_not = linear_why_not(p, d, false)) return why_not;
  if (p.M > kMaxRows) return "more than 64 rows: the kernels for a few rows read the weights again for each 16 of them";
  if (p.most_rank() * p.K >= kMaxNumber || p.N * p.most_rank() >= kMaxNumber)
    return "a factor has 2^31 numbers or more";
  return nullptr;
}

}  // namespace

ShrinkExpandTile shrink_expand_tile_of(const LinearGrid& grid) { return {grid.tile.block_m, grid.tile.form}; }

const char* shrink_expand_why_not(const LinearProblem& p, const Device& d) {
  if (const char* why_not = why_not_any(p, d)) return why_not;
  const auto fitting = [&](const ShrinkExpandTile& tile) { return fits(tile, p, d); };
  if (std::any_of(kShrinkExpandTiles.begin(), kShrinkExpandTiles.end(), fitting)) return nullptr;
  return "R is above 2048, or the rows of h need more shared memory than a block has here";
}

const char* shrink_expand_why_not(const LinearProblem& p, const Device& d, const LinearTile& tile, int64_t splits) {
  if (const char* why_not = why_not_any(p, d)) return why_not;
  const ShrinkExpandTile wanted{tile.block_m, p.form()};
  if (std::find(kShrinkExpandTiles.begin(), kShrinkExpandTiles.end(), wanted) == kShrinkExpandTiles.end())
    return "no kernel is compiled for this tile";
  if (!fits(wanted, p, d))
    return "R is above the tile's rank, or the tile needs more shared memory than a block has here";
  if (splits < 1 || splits > kMaxSplits) return "the splits of K must be 1 to 64";
  return nullptr;
}

LinearGrid shrink_expand_grid_of(const LinearProblem& p, const LinearTile& tile, int splits) {
  return {{tile.block_m, 0, p.form()}, ceil_div(p.M, tile.block_m), splits};
}

std::vector<PlannedGrid> shrink_expand_grids(const LinearProblem& p, const Device& d, std::size_t most) {
  LinearProblem training = p, inference = p;
  training.training = true;
  inference.training = false;
  std::vector<std::pair<double, PlannedGrid>> all;
  for (const ShrinkExpandTile& tile : kShrinkExpandTiles) {
    if (!fits(tile, p, d)) continue;
    for (int splits = 1; splits <= kMaxSplits; splits *= 2) {
      if (splits > 1 && splits * ShrinkExpandTile::kShrinkWarps > chunks_of(p.K)) break;
      const LinearGrid grid = shrink_expand_grid_of(p, {tile.tokens, 0}, splits);
      const double costs[] = {microseconds(inference, d, grid), microseconds(training, d, grid)};
      all.emplace_back(costs[0] + costs[1], PlannedGrid{grid, costs[p.training]});
    }
  }
  return cheapest(std::move(all), most);
}

double bytes_in_flight(const LinearProblem& p, const Device& d, const LinearGrid& grid) {
  const ShrinkExpandTile tile = shrink_expand_tile_of(grid);
  const int64_t blocks = shrink_blocks(p) * grid.blocks_n;
  const int64_t of_sm = std::min<int64_t>(ceil_div(blocks, d.sms),
                                          resident_blocks(ShrinkExpandTile::kShrinkThreads, tile.shrink_bytes(), d));
  return real(of_sm) * ShrinkExpandTile::kShrinkWarps * tile.bytes_in_flight();
}

double bytes_needed_in_flight(const LinearProblem& p, const Device& d) {
  const double law = d.bandwidth / d.sms * kDramLatencyUs * 1e-6,
               share = real(p.ranks() * p.K) * bytes(p.dtype) / d.sms;
  return std::min(law, share);
}

}  // namespace shrank
