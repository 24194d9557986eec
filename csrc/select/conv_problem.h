// One low-rank convolution as numbers: h = x convolved with down, y = activation(h convolved with up, a point, + bias)
// + residual.
#pragma once

#include <array>

#include "linear_problem.h"

namespace shrank {

using Size3 = std::array<int64_t, 3>;  // depth, height, width; 1 where a convolution has fewer dimensions

constexpr int64_t volume(const Size3& size) { return size[0] * size[1] * size[2]; }

struct ConvProblem {
  int64_t batch, C, N, R;  // x (batch, C, *in), down (R, C / groups, *kernel), up (N, R / up_groups, 1...)
  Size3 in{1, 1, 1}, kernel{1, 1, 1}, stride{1, 1, 1}, begin{}, end{}, dilation{1, 1, 1};  // begin, end: zero padding
  int64_t groups = 1, up_groups = 1;
  Dtype dtype = Dtype::bfloat16;
  Activation activation = Activation::none;
  bool bias = false;
  bool residual = false;
  bool training = false;  // h and the pre-activation are kept for the backward pass
  bool channels_last = true;  // every tensor with its channels innermost, without gaps, from a multiple of 16 bytes on
  bool captured = false;  // into a CUDA graph

  constexpr Size3 out() const {
    Size3 size{};
    for (std::size_t i = 0; i < 3; i++)
      size[i] = (in[i] + begin[i] + end[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
    return size;
  }
  constexpr int64_t pixels() const { return batch * volume(out()); }
  constexpr int64_t taps() const { return volume(kernel); }
  constexpr int64_t K() const { return taps() * (C / groups); }  // numbers of a filter
  constexpr bool is_depthwise() const { return groups > 1 && groups == C && C == R; }

  // A group of the second stage reads whole groups of the first, this many, or a part of one.
  constexpr int64_t segments() const { return groups > up_groups ? groups / up_groups : 1; }

  constexpr bool operator==(const ConvProblem& o) const {
    return batch == o.batch && C == o.C && N == o.N && R == o.R && in == o.in && kernel == o.kernel &&
           stride == o.stride && begin == o.begin && end == o.end && dilation == o.dilation && groups == o.groups &&
           up_groups == o.up_groups && dtype == o.dtype && activation == o.activation && bias == o.bias &&
           residual == o.residual && training == o.training && channels_last == o.channels_last &&
           captured == o.captured;
  }
};

// The second stage alone, or what comes after it: pixels are tokens.
constexpr LinearProblem pointwise(const ConvProblem& p) {
  return {p.pixels(),      p.R,       p.N, p.R, p.dtype, p.activation, p.bias, p.residual, p.training,
          p.channels_last, p.captured};
}

}  // namespace shrank
