#include "linear_grid.h"

#include <algorithm>

#include "cost.h"
#include "integers.h"

namespace shrank {
namespace {

constexpr int kMaxRank = 256;  // of an h that a block holds
constexpr int kMaxBlocksN = 64;

bool fits(const LinearTile& tile, const Device& d) { return tile.shared_bytes() <= d.smem_per_block; }

// The smallest rank that is compiled and holds p.R: a larger one would only multiply zeros.
int rank_held(const LinearProblem& p) {
  int least = 0;
  for (const LinearTile& tile : kLinearTiles)
    if (tile.max_rank >= p.R && (least == 0 || tile.max_rank < least)) least = tile.max_rank;
  return least;
}

bool suits(const LinearTile& tile, const LinearProblem& p, const Device& d, bool fused) {
  return (tile.holds_h() ? tile.max_rank == rank_held(p) : !fused) && fits(tile, d);
}

double microseconds(const LinearGrid& grid, const LinearProblem& p, const Device& d, bool fused) {
  const LinearTile& tile = grid.tile;
  const auto M = real(p.M), K = real(p.K), N = real(p.N), R = real(p.R);
  const double blocks = real(grid.blocks_m) * grid.blocks_n, sms = d.sms;
  const double rank = tile.holds_h() ? tile.max_rank : real(ceil_div(p.R, 16) * 16);
  const double columns = real(ceil_div(ceil_div(p.N, LinearTile::kBlockN), grid.blocks_n)) *
                         LinearTile::kBlockN;  // of a block that has most

  // The SM with most blocks ends last.
  const double rounds = real(ceil_div(static_cast<int64_t>(blocks), d.sms));
  const double flops = 2.0 * tile.block_m * rank * ((fused ? K : 0) + columns);
  const double arithmetic = rounds * flops / (d.flops_half * mma_share(d.arch) / sms);

  const double read = (fused ? M * K + R * K : M * R) + N * R + bias_numbers(p) + (p.residual ? M * N : 0);
  const double written = M * N + (keeps_preactivation(p) ? M * N : 0) + (fused && p.training ? M * R : 0);
  const double tails = 1.0 + (p.residual ? 1 : 0) + (keeps_preactivation(p) ? 1 : 0);
  const double of_block = tile.block_m * ((fused ? K : R) + columns * tails);
  const double dram = std::max((read + written) / d.bandwidth, rounds * of_block / (kDrawOfOneSm * d.bandwidth / sms)) *
                      bytes(p.dtype);

  const double tiles = columns / LinearTile::kBlockN;
  const double for_h = fused ? (tile.block_m + R) * K : tile.block_m * R * (tile.holds_h() ? 1 : tiles);
  const double from_l2 = bytes(p.dtype) * (for_h + columns * (R + (p.residual ? tile.block_m : 0)));  // of a block
  const double l2 = std::max(blocks * from_l2 / (sms * kL2PerSm), rounds * from_l2 / kL2OfOneSm);

  const double down_steps = fused ? real(ceil_div(p.K, LinearTile::kPanel)) : 0;
  const double up_steps = tiles * real(ceil_div(p.R, LinearTile::kPanel));
  const double walk = down_steps * kDramLatencyUs / (tile.down_stages() - 1) +
                      up_steps * kL2LatencyUs / (tile.up_stages() - 1);
  return std::max(std::max({arithmetic, dram, l2}) * 1e6, walk) + d.node_us;
}

}  // namespace

const char* linear_why_not(const LinearProblem& p, const Device& d, bool fused) {
  if (p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16)
    return "the tensor core kernels take bfloat16 and float16";
  if (d.arch < 80) return "the tensor core kernels need compute capability 8.0";
  if (p.M == 0 || p.K == 0 || p.N == 0 || p.R == 0) return "a size is zero";
  if (p.M >= int64_t{1} << 31 || p.K >= int64_t{1} << 31 || p.N >= int64_t{1} << 31) return "a size is 2^31 or more";
  if (p.K % 8 || p.N % 8 || p.R % 8) return "K, N and R must be multiples of 8: rows are read 16 bytes at a time";
  if (!p.aligned) return "a tensor has gaps or does not begin at a multiple of 16 bytes";
  if (fused && p.R > kMaxRank) return "R is above 256: h does not fit in shared memory";
  for (const LinearTile& tile : kLinearTiles)
    if (suits(tile, p, d, fused)) return nullptr;
  return "the tiles for this R need more shared memory than a block has here";
}

PlannedGrid linear_grid(const LinearProblem& p, const Device& d, bool fused) {
  LinearProblem training = p, inference = p;
  training.training = true;
  inference.training = false;
  PlannedGrid best{};
  double least = 0;
  for (const LinearTile& tile : kLinearTiles) {
    if (!suits(tile, p, d, fused)) continue;
    const int64_t tiles_n = ceil_div(p.N, LinearTile::kBlockN);
    for (int blocks_n = 1; blocks_n <= std::min<int64_t>(kMaxBlocksN, tiles_n); blocks_n *= 2) {
      const LinearGrid grid{tile, ceil_div(p.M, tile.block_m), blocks_n};
      const double cost = microseconds(grid, training, d, fused) + microseconds(grid, inference, d, fused);
      if (best.grid.blocks_n == 0 || cost < least) best = {grid, 0}, least = cost;
    }
  }
  best.microseconds = microseconds(best.grid, p, d, fused);
  return best;
}

}  // namespace shrank
