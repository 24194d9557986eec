#include "conv_grid.h"

#include <algorithm>
#include <cmath>

#include "conv_cost.h"
#include "cost.h"
#include "integers.h"

namespace shrank {
namespace {

constexpr int kMaxRank = 256;  // that one block holds of the sums of h; of a depthwise h, what shared memory holds
constexpr int kMaxDepthwiseRank = 1536;
constexpr int kMaxBlocksN = 64;
constexpr int64_t kTooLarge = int64_t{1} << 30;  // places in x are 32-bit numbers, and padding lies below zero

// Instructions of a thread: for a copy of 8 channels its place, three comparisons and its addresses; for a number that
// is read by itself as many, and its place in the filter. Counted in csrc/kernels/gather.cuh.
constexpr double kCopyInstructions = 20, kNumberInstructions = 24;

// L1 and shared memory are one; a block may not have all of it (CUDA C++ Programming Guide: 192, 128, 256 KiB of an
// sm_80, sm_89, sm_90).
constexpr double kBeyondShared = 29 * 1024;

bool whole_groups(const ConvProblem& p) {
  return p.groups > p.up_groups ? p.groups % p.up_groups == 0 : p.up_groups % p.groups == 0;
}

Gather gather_of(const ConvProblem& p) {
  if (p.is_depthwise()) return Gather::depthwise;
  return p.C / p.groups % 8 == 0 ? Gather::chunks : Gather::numbers;
}

bool suits(const ConvTile& tile, const ConvProblem& p, const Device& d) {
  return tile.gather == gather_of(p) && tile.tile.max_rank >= p.R / p.up_groups &&
         tile.shared_bytes() <= d.smem_per_block;
}

// Blocks that share an SM, by their shared memory; more than two have too many registers.
int resident(const ConvTile& tile, const Device& d) { return 2 * tile.shared_bytes() <= d.smem_per_block ? 2 : 1; }

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

// What a block does: multiply-adds of the tensor cores, instructions of a thread, numbers that pass L1 and L2, steps of
// the first pipeline. Bytes of L1 in a clock: an SM has 128, and copies to shared memory write what they read.
struct Work { double products, instructions, from_l1, from_l2, steps, l1_rate; };

Work depthwise_work(const ConvTile& tile, const ConvProblem& p, const Device& d) {
  const double block_m = tile.tile.block_m, rank = real(p.R / p.up_groups), taps = real(p.taps());
  const double channels = std::min(rank, double{LinearTile::kPanel});
  return {0,
          block_m * rank * taps * kDepthwiseInstructions,
          block_m * rank * taps,
          pixels_read(p, tile, channels, d) * rank + rank * taps,
          0,
          2 * kL2OfOneSm};
}

Work gather_work(const ConvTile& tile, const ConvProblem& p, const Device& d) {
  const LinearTile& t = tile.tile;
  const int64_t run = run_channels(p), segments = p.segments(), runs = p.C / p.groups / run;
  const double steps = real(segments * runs * ceil_div(p.taps() * run, LinearTile::kPanel));
  const double k = steps * LinearTile::kPanel;
  // Columns beyond a segment are skipped, but the warps that have them only wait.
  const int64_t busy = std::min<int64_t>(t.max_rank / t.warps_n(), ceil_div(p.R / p.up_groups / segments, 16) * 16);
  const double instructions = tile.gather == Gather::chunks ? t.block_m * k / 8 * kCopyInstructions
                                                            : (t.block_m + t.max_rank) * k * kNumberInstructions;
  const double from_x = pixels_read(p, tile, real(run), d) * real(segments * runs * run);
  return {t.block_m * k * real(busy * t.warps_n()),       instructions, t.block_m * k,
          from_x + real(p.R / p.up_groups) * real(p.K()), steps,        kL2OfOneSm};
}

double microseconds(const ConvGrid& grid, const ConvProblem& p, const Device& d) {
  const LinearTile& tile = grid.tile.tile;
  const bool depthwise = grid.tile.gather == Gather::depthwise;
  const double M = real(p.pixels()), N = real(p.N), R = real(p.R), rank = real(p.R / p.up_groups), sms = d.sms;
  const int64_t blocks = grid.blocks_m * grid.blocks_n * p.up_groups;
  const double rounds = real(ceil_div(blocks, d.sms));
  const double tiles = real(ceil_div(ceil_div(p.N / p.up_groups, LinearTile::kBlockN), grid.blocks_n));
  const double columns = tiles * LinearTile::kBlockN, real_columns = std::min(columns, real(p.N / p.up_groups));
  const Work work = depthwise ? depthwise_work(grid.tile, p, d) : gather_work(grid.tile, p, d);

  const double up_rank = depthwise ? real(ceil_div(p.R / p.up_groups, 16) * 16) : tile.max_rank;
  const double products = work.products + tile.block_m * up_rank * columns;
  const double arithmetic = rounds * 2 * products / (d.flops_half * mma_share(d.arch) / sms);
  const double issue = rounds * work.instructions / (instruction_rate(d) / sms);
  // A depthwise stage and the tensor cores take turns, unless another block fills the gaps.
  const bool turns = depthwise && resident(grid.tile, d) == 1;
  const double compute = turns ? arithmetic + issue : std::max(arithmetic, issue);

  const double x = real(p.batch * p.C) * real(volume(p.in));
  const double ends = 1.0 + (p.residual ? 1 : 0) + (keeps_preactivation(pointwise(p)) ? 1 : 0);
  const double moved = x + R * real(p.K()) + N * rank + (p.bias ? N : 0) + M * N * ends + (p.training ? M * R : 0);
  const double of_block = x / real(grid.blocks_m) + tile.block_m * real_columns * ends;
  const double dram = std::max(moved / d.bandwidth, rounds * of_block / (kDrawOfOneSm * d.bandwidth / sms));
  const double from_l2 = work.from_l2 + real_columns * (rank + (p.residual ? tile.block_m : 0));
  const double l2 = std::max(real(blocks) * from_l2 / (sms * kL2PerSm), rounds * from_l2 / kL2OfOneSm);
  const double streams = std::max({dram, l2, rounds * work.from_l1 / work.l1_rate}) * bytes(p.dtype);

  // The first tap waits for DRAM, the others for what L2 or L1 has by then.
  const double first = std::ceil(work.steps / real(p.taps()));
  const double walk = (first * kDramLatencyUs + (work.steps - first) * kL2LatencyUs) / (tile.down_stages() - 1) +
                      tiles * real(ceil_div(p.R / p.up_groups, LinearTile::kPanel)) * kL2LatencyUs /
                          (tile.up_stages() - 1);
  return std::max(std::max(compute, streams) * 1e6, walk) + d.node_us;
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
  if (p.up_groups * kMaxBlocksN > 65535) return "the second stage has more groups than a grid has blocks";
  if (p.is_depthwise() && p.taps() > ConvTile::kMostTaps) return "a depthwise filter has more than 256 taps";
  if (p.R / p.up_groups > (p.is_depthwise() ? kMaxDepthwiseRank : kMaxRank))
    return "h does not fit a block: at most rank 256 for each group of the second stage, 1536 if depthwise";
  for (const ConvTile& tile : kConvTiles)
    if (suits(tile, p, d)) return nullptr;
  return "the tiles for this rank need more shared memory than a block has here";
}

PlannedConv conv_grid(const ConvProblem& p, const Device& d) {
  ConvProblem training = p, inference = p;
  training.training = true;
  inference.training = false;
  PlannedConv best{};
  double least = 0;
  const int64_t tiles_n = ceil_div(p.N / p.up_groups, LinearTile::kBlockN);
  for (const ConvTile& tile : kConvTiles) {
    if (!suits(tile, p, d)) continue;
    for (int blocks_n = 1; blocks_n <= std::min<int64_t>(kMaxBlocksN, tiles_n); blocks_n *= 2) {
      const ConvGrid grid{tile, ceil_div(p.pixels(), tile.tile.block_m), blocks_n};
      const double cost = microseconds(grid, training, d) + microseconds(grid, inference, d);
      if (best.grid.blocks_n == 0 || cost < least) best = {grid, 0}, least = cost;
    }
  }
  best.microseconds = microseconds(best.grid, p, d);
  return best;
}

}  // namespace shrank
