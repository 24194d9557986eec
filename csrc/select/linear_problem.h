// One low-rank product as numbers: y = activation(x down^T up^T + bias) + residual.
#pragma once

#include <cstdint>

#include "vocabulary.h"

namespace shrank {

struct LinearProblem {
  int64_t M, K, N, R;  // x (M, K), down (R, K), up (N, R), y (M, N)
  Dtype dtype = Dtype::bfloat16;
  Activation activation = Activation::none;
  bool bias = false;
  bool residual = false;
  bool training = false;  // h is kept for the backward pass
  bool aligned = true;    // every tensor is contiguous and begins at a multiple of 16 bytes
  bool captured = false;  // into a CUDA graph, where a launch costs the host nothing

  constexpr bool operator==(const LinearProblem& other) const {
    return M == other.M && K == other.K && N == other.N && R == other.R && dtype == other.dtype &&
           activation == other.activation && bias == other.bias && residual == other.residual &&
           training == other.training && aligned == other.aligned && captured == other.captured;
  }

  // The same of equal problems.
  constexpr uint64_t mix() const {
    return static_cast<uint64_t>(M * 31 + K * 7 + N * 5 + R * 3 + static_cast<int>(activation) * 2 + training +
                                 residual * 11);
  }
};

}  // namespace shrank
