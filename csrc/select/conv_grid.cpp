#include "conv_grid.h"

#include <algorithm>
#include <cmath>

#include "cheapest.h"
#include "conv_cost.h"
#include "cost.h"
#include "integers.h"
#include "kernel_slots.h"
#include "linear_grid.h"
#include "tile_cost.h"

namespace shrank {
namespace {

constexpr int kMaxRank = 256;  // that one block holds of the sums of h; of a depthwise h, what shared memory holds
constexpr int kMaxDepthwiseRank = 1536;
constexpr int64_t kTooLarge = int64_t{1} << 30;  // places in x are 32-bit numbers, and padding lies below zero

// L1 and shared memory are one; a block may not have all of it (CUDA C++ Programming Guide: 192, 128, 256 KiB of an
// sm_80, sm_89, sm_90).
constexpr double kBeyondShared = 29 * 1024;

bool whole_groups(const ConvProblem& p) {
  return p.groups > p.up_groups ? p.groups % p.up_groups == 0 : p.up_groups % p.groups == 0;
}

bool suits(const ConvTile& tile, const ConvProblem& p, const Device& d) {
  return tile.gather == gather_of(p) && tile.tile.max_rank >= p.R / p.up_groups &&
         tile.shared_bytes() <= d.smem_per_block;
}

int resident(const ConvTile& tile, const Device& d) {
  return resident_blocks(tile.tile.threads(), tile.shared_bytes(), d);
}

// How many pixels of x a block must bring for its windows, if L1 keeps what `channels` of them are. From the first
// origin to the last and a window beyond, if L1 holds that; else again for each line of the window, if it holds a line;
// else for each tap.
double pixels_read(const ConvProblem& p, const ConvTile& tile, double channels, const Device& d) {
  const double rows = real(p.in[1]), line = real(p.in[2]), block_m = tile.tile.block_m;
  const auto reach = [&](std::size_t i) { return real((p.kernel[i] - 1) * p.dilation[i]); };
  const double span = block_m * real(volume(p.in)) / real(volume(p.out())) + reach(2);
  const double room = d.smem_per_block + kBeyondShared - resident(tile, d) * tile.shared_bytes();
  const auto fits = [&](double pixels) { return resident(tile, d) * pixels * channels * bytes(p.dtype) <= room; };
  const double all = span + (reach(0) * rows + reach(1)) * line, taps = block_m * real(p.taps());
  if (fits(all)) return std::min(all, taps);
  if (fits(span)) return std::min(span * real(p.kernel[0] * p.kernel[1]), taps);
  return taps;
}

// 64 channels at a time: a warp has 8 of them in each of its rows.
Phase depthwise(const ConvTile& tile, const ConvProblem& p, const Device& d) {
  const double rank = real(p.R / p.up_groups), taps = real(p.taps()), width = bytes(p.dtype);
  const double channels = std::min(rank, double{LinearTile::kPanel}), warps = tile.tile.threads() / 32;
  const double steps = std::ceil(rank / LinearTile::kPanel) * taps, pixels = tile.tile.block_m / (warps * 4);
  Phase phase;
  phase.slots = warps * steps * (kDepthwiseStep.own + kDepthwiseStep.per_copy * pixels);
  phase.l1_bytes = tile.tile.block_m * rank * taps * width;
  phase.l2_bytes = (pixels_read(p, tile, channels, d) * rank + rank * taps) * width;
  return phase;
}

// Windows by filters, in steps of 64 numbers: the first tap waits for DRAM, the others for what L2 or L1 has by then.
Phase gather(const ConvTile& tile, const ConvProblem& p, const Device& d) {
  const LinearTile& t = tile.tile;
  const int64_t run = run_channels(p), segments = p.segments(), runs = p.C / p.groups / run;
  const double steps = real(segments * runs * ceil_div(p.taps() * run, LinearTile::kPanel)), width = bytes(p.dtype);
  // Columns beyond a segment are skipped, but the warps that have them only wait.
  const auto busy = static_cast<int>(
      std::min<int64_t>(t.max_rank / LinearTile::kWarpsN, ceil_div(p.R / p.up_groups / segments, 16) * 16));
  Phase phase = products_of(t, busy * LinearTile::kWarpsN);
  phase.slots += window_slots(tile);
  // Copies to shared memory pass L1 once as what is read and once as what is written.
  phase.l1_bytes = 2 * width * t.block_m * LinearTile::kPanel;
  phase = phase * steps;
  phase.l2_bytes = width * (pixels_read(p, tile, real(run), d) * real(segments * runs * run) +
                            real(p.R / p.up_groups) * real(p.K()));
  const double first = std::ceil(steps / real(p.taps()));
  phase.wait_us = (first * kDramLatencyUs + (steps - first) * kL2LatencyUs) / (t.down_stages() - 1);
  return phase;
}

double microseconds(const ConvGrid& grid, const ConvProblem& p, const Device& d) {
  const LinearTile& tile = grid.tile.tile;
  const bool is_depthwise = grid.tile.gather == Gather::depthwise;
  const double M = real(p.pixels()), N = real(p.N), rank = real(p.R / p.up_groups), width = bytes(p.dtype);
  const double tiles = real(ceil_div(ceil_div(p.N / p.up_groups, LinearTile::kBlockN), grid.blocks_n));
  const double rank_panels = is_depthwise ? real(ceil_div(p.R / p.up_groups, LinearTile::kPanel)) : tile.h_panels();
  const double x = real(p.batch * p.C) * real(volume(p.in));

  Phase down = is_depthwise ? depthwise(grid.tile, p, d) : gather(grid.tile, p, d);
  down.dram_bytes = width * x / real(grid.blocks_m);

  const Phase rounding = is_depthwise ? Phase{} : rounding_of_h(tile);

  Phase up = up_step(tile) * (tiles * rank_panels);
  up.l2_bytes = width * std::min(tiles * LinearTile::kBlockN, real(p.N / p.up_groups)) * rank;
  up.wait_us = tiles * rank_panels * kL2LatencyUs / (tile.up_stages() - 1);

  const Phase end = end_of(tile, pointwise(p)) * tiles;
  const double read = x + real(p.R) * real(p.K()) + N * rank + bias_numbers(pointwise(p)) + (p.residual ? M * N : 0);
  const double moved = read + M * N + (p.training ? M * real(p.R) : 0);
  const Launch launch{grid.blocks_m * grid.blocks_n * p.up_groups, tile.threads(), grid.tile.shared_bytes(),
                      moved * width};
  return kernel_us(launch, {{0, 0, 0, 0, 0, kDramLatencyUs}, down, rounding, up, end}, d);
}

}  // namespace

const char* conv_why_not(const ConvProblem& p, const Device& d) {
  if (p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16)
    return "the convolution kernels take bfloat16 and float16";
  if (d.arch < 80) return "the convolution kernels need compute capability 8.0";
  if (p.pixels() <= 0 || p.C == 0 || p.N == 0 || p.R == 0) return "a size is zero";
  for (const int64_t size : {p.batch * volume(p.in), p.pixels(), p.K(), p.N, p.R, p.C, volume(p.dilation)})
    if (size >= kTooLarge) return "a size is 2^30 or more";
  if (!p.channels_last)
    return "a tensor is not channels last (its channels innermost, without gaps) or does not begin at a multiple of 16 "
           "bytes: the kernels read 8 channels at a time";
  if (!whole_groups(p)) return "a group of the second stage reads parts of several groups of the first";
  if (p.N / p.up_groups % 8 || p.R / p.up_groups % 8)
    return "the rank and the outputs of each group of the second stage must be multiples of 8";
  if (!p.is_depthwise() && p.R / p.up_groups / p.segments() % 8)
    return "the rank of each group of the first stage must be a multiple of 8";
  if (p.up_groups * kMaxShares > 65535) return "the second stage has more groups than a grid has blocks";
  if (p.is_depthwise() && !taps_are_listed(p, Gather::depthwise))
    return "a depthwise filter has more than 256 taps, or its axes more than 31 in all";
  if (p.R / p.up_groups > (p.is_depthwise() ? kMaxDepthwiseRank : kMaxRank))
    return "h does not fit a block: at most rank 256 for each group of the second stage, 1536 if depthwise";
  for (const ConvTile& tile : kConvTiles)
    if (suits(tile, p, d)) return nullptr;
  return "the tiles for this rank need more shared memory than a block has here";
}

Gather gather_of(const ConvProblem& p) {
  if (p.is_depthwise()) return Gather::depthwise;
  if (p.C / p.groups % 8) return Gather::numbers;
  return p.segments() == 1 && taps_are_listed(p, Gather::chunks) ? Gather::chunks : Gather::analytic;
}

const char* conv_why_not(const ConvProblem& p, const Device& d, const ConvTile& tile, int64_t shares) {
  if (const char* why_not = conv_why_not(p, d)) return why_not;
  if (std::find(kConvTiles.begin(), kConvTiles.end(), tile) == kConvTiles.end())
    return "no kernel is compiled for this tile";
  if (tile.gather != gather_of(p)) return "the tile reads x in another way than the problem needs";
  if (tile.tile.max_rank < p.R / p.up_groups) return "the rank of a group is above the tile's";
  if (tile.shared_bytes() > d.smem_per_block) return "the tile needs more shared memory than a block has here";
  if (shares < 1 || shares > kMaxShares) return kWrongShares;
  return nullptr;
}

ConvGrid conv_grid_of(const ConvProblem& p, const ConvTile& tile, int shares) {
  return {tile, ceil_div(p.pixels(), tile.tile.block_m), shares};
}

namespace {

// As in linear_grid.cpp.
template <typename Visit> void for_each_grid(const ConvProblem& p, const Device& d, const Visit& visit) {
  ConvProblem training = p, inference = p;
  training.training = true;
  inference.training = false;
  const int64_t tiles_n = ceil_div(p.N / p.up_groups, LinearTile::kBlockN);
  for (const ConvTile& tile : kConvTiles) {
    if (!suits(tile, p, d)) continue;
    for (int blocks_n = 1; blocks_n <= std::min<int64_t>(kMaxShares, tiles_n); blocks_n *= 2) {
      const ConvGrid grid = conv_grid_of(p, tile, blocks_n);
      const double costs[] = {microseconds(grid, inference, d), microseconds(grid, training, d)};
      visit(PlannedConv{grid, costs[p.training]}, costs[0] + costs[1]);
    }
  }
}

}  // namespace

PlannedConv conv_grid(const ConvProblem& p, const Device& d) {
  PlannedConv best{};
  double least = 0;
  for_each_grid(p, d, [&](const PlannedConv& planned, double both) {
    if (best.grid.blocks_n == 0 || both < least) best = planned, least = both;
  });
  return best;
}

std::vector<PlannedConv> conv_grids(const ConvProblem& p, const Device& d, std::size_t most) {
  std::vector<std::pair<double, PlannedConv>> all;
  for_each_grid(p, d, [&](const PlannedConv& planned, double both) { all.emplace_back(both, planned); });
  return cheapest(std::move(all), most);
}

}  // namespace shrank
