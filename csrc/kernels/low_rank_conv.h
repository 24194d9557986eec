// The whole low-rank convolution in one kernel, channels last.
#pragma once

#include "../arch/device.cuh"
#include "../select/conv_problem.h"
#include "../select/conv_tile.h"

namespace shrank {

// Depth, height and width; 1 where a convolution has fewer dimensions.
struct ConvWindow {
  int in[3], out[3], kernel[3], stride[3], begin[3], dilation[3];  // begin: padding before the first number

  SHRANK_BOTH int taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// Every tensor as (pixels, channels): row-major, contiguous, aligned to 16 bytes. M pixels of y, all images together.
// The first stage's filters are rows of K numbers: tap after tap, of each its group's channels.
// A group of the second stage reads R columns of h and writes N of y; its columns of h come from `segments` groups of
// the first stage, one after the other.
struct LowRankConvParams {
  const void* x;         // (pixels of x, channels)
  const void* down;      // (R * up_groups, K)
  const void* up;        // (N * up_groups, R)
  const void* bias;      // (N * up_groups) or null
  const void* residual;  // (M, N * up_groups) or null
  void* h;               // (M, R * up_groups) or null
  void* y;               // (M, N * up_groups)
  int64_t M;
  int channels, group_channels, K, N, R, up_groups, segments;
  int down_rank;     // columns of h that one group of the first stage makes
  int run_channels;  // of a group that are read at a time, through all taps: a divisor of group_channels
  int blocks_n;      // of one group
  ConvWindow window;
  Dtype dtype;  // float16 or bfloat16
  Activation activation;
};

// Everything but the tensors.
inline LowRankConvParams params_of(const ConvProblem& p, const ConvGrid& grid) {
  const auto number = [](int64_t wide) { return static_cast<int>(wide); };
  LowRankConvParams params{};
  params.M = p.pixels();
  params.channels = number(p.C);
  params.group_channels = number(p.C / p.groups);
  params.K = number(p.K());
  params.N = number(p.N / p.up_groups);
  params.R = number(p.R / p.up_groups);
  params.up_groups = number(p.up_groups);
  params.segments = number(p.segments());
  params.down_rank = number(p.R / p.groups);
  params.run_channels = number(run_channels(p));
  params.blocks_n = grid.blocks_n;
  params.dtype = p.dtype;
  params.activation = p.activation;
  const Size3 out = p.out();
  for (std::size_t i = 0; i < 3; i++) {
    params.window.in[i] = number(p.in[i]);
    params.window.out[i] = number(out[i]);
    params.window.kernel[i] = number(p.kernel[i]);
    params.window.stride[i] = number(p.stride[i]);
    params.window.begin[i] = number(p.begin[i]);
    params.window.dilation[i] = number(p.dilation[i]);
  }
  return params;
}

// Rounds as low_rank_linear does. `dependent`: as there.
void launch_low_rank_conv(const LowRankConvParams& params, const ConvGrid& grid, bool dependent, void* stream);

}  // namespace shrank
