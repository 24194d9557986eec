// The shapes in which the convolution kernels are compiled: what select may choose, what kernels/low_rank_conv.cuh and
// depthwise.cuh take.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "conv_problem.h"
#include "linear_tile.h"

namespace shrank {

// How the first stage reads x.
enum class Gather {
  chunks,     // 8 channels at a time, in the background, for the tensor cores: the taps are listed beforehand
  analytic,   // the same for any filter and groups: each place is computed when it is needed
  numbers,    // one by one, for the tensor cores: any number of channels
  depthwise,  // a filter for each channel, which the tensor cores cannot help with
};
inline constexpr std::array<std::string_view, 4> kGatherNames{"chunks", "analytic", "numbers", "depthwise"};
constexpr std::string_view name_of(Gather gather) { return kGatherNames[static_cast<std::size_t>(gather)]; }

// Channels of a group that a kernel reads at a time, through all taps: a panel's width, or all if that does not divide
// them.
constexpr int64_t run_channels(const ConvProblem& p) {
  const int64_t channels = p.C / p.groups;
  return channels % LinearTile::kPanel == 0 ? int64_t{LinearTile::kPanel} : channels;
}

// A kernel lists a filter's taps, of which each has a bit for each of its coordinates; and there is one that no window
// has. An axis with one tap needs no bit, but for the last.
inline constexpr int kListedCoordinates = 31;

// That the list holds; 0 where there is none.
constexpr int most_taps(Gather gather) {
  return gather == Gather::chunks ? 120 : gather == Gather::depthwise ? 256 : 0;
}

constexpr bool taps_are_listed(const ConvProblem& p, Gather gather) {
  const auto of_axis = [&](std::size_t axis) { return p.kernel[axis] > 1 ? p.kernel[axis] : 0; };
  return p.taps() <= most_taps(gather) && of_axis(0) + of_axis(1) + p.kernel[2] <= kListedCoordinates;
}

struct ConvTile {
  Gather gather;
  LinearTile tile;  // that holds h; of any rank up to 1536, where it is depthwise

  // Where each row's window begins, behind all else: 8 bytes and the list of taps, 8 bytes each, or 16. A step's chunks
  // reach up to 7 taps beyond the last. A depthwise filter's taps of 64 channels, in fp32, take the place that panels of
  // up have later.
  constexpr int origins() const {
    return gather == Gather::depthwise ? tile.h_bytes() + tile.up_bytes() : tile.shared_bytes();
  }
  constexpr int taps() const { return origins() + tile.block_m * 8; }
  constexpr int shared_bytes() const {
    return most_taps(gather) ? taps() + (most_taps(gather) + 8) * 8 : origins() + tile.block_m * 16;
  }

  constexpr bool operator==(const ConvTile& other) const { return gather == other.gather && tile == other.tile; }
};

inline constexpr std::array<ConvTile, 24> kConvTiles{{
    {Gather::chunks, {32, 64}},     {Gather::chunks, {32, 128}},     {Gather::chunks, {32, 256}},
    {Gather::chunks, {64, 32}},     {Gather::chunks, {64, 64}},      {Gather::chunks, {64, 96}},
    {Gather::chunks, {64, 128}},    {Gather::chunks, {64, 256}},     {Gather::chunks, {128, 32}},
    {Gather::chunks, {128, 64}},    {Gather::chunks, {128, 128}},    {Gather::analytic, {64, 64}},
    {Gather::analytic, {64, 128}},  {Gather::analytic, {64, 256}},   {Gather::numbers, {64, 64}},
    {Gather::numbers, {64, 128}},   {Gather::numbers, {64, 256}},    {Gather::depthwise, {128, 128}},
    {Gather::depthwise, {64, 256}}, {Gather::depthwise, {128, 256}}, {Gather::depthwise, {32, 512}},
    {Gather::depthwise, {64, 512}}, {Gather::depthwise, {64, 1024}}, {Gather::depthwise, {32, 1536}},
}};

// How a tile covers a problem: blocks_m blocks of pixels by blocks_n for each group of the second stage, which compute
// the same h and take one run of column tiles each.
struct ConvGrid {
  ConvTile tile{};
  int64_t blocks_m = 0;
  int blocks_n = 0;
};

}  // namespace shrank
