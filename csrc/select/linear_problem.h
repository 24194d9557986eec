// One low-rank product as numbers: y = activation(x down^T up^T + bias) + residual. Or a gated layer's two, of which y is
// the product: activation(gate) value.
#pragma once

#include <cstdint>

#include "linear_tile.h"
#include "vocabulary.h"

namespace shrank {

struct LinearProblem {
  int64_t M, K, N, R;  // x (M, K), down (R, K), up (N, R), y (M, N)
  Dtype dtype = Dtype::bfloat16;
  Activation activation = Activation::none;
  bool bias = false;
  bool residual = false;
  bool training = false;  // h is kept for the backward pass
  bool aligned = true;  // every tensor is contiguous and begins at a multiple of 16 bytes
  bool captured = false;  // into a CUDA graph, where a launch costs the host nothing
  int64_t gate_R = 0;  // the rank of the gate; R is that of the value. 0: no gate
  // R columns of y are h itself, and up has rows for the others alone; of a gated layer in costs both.
  bool pivoted = false;

  constexpr bool operator==(const LinearProblem& other) const {
    return M == other.M && K == other.K && N == other.N && R == other.R && dtype == other.dtype &&
           activation == other.activation && bias == other.bias && residual == other.residual &&
           training == other.training && aligned == other.aligned && captured == other.captured &&
           gate_R == other.gate_R && pivoted == other.pivoted;
  }

  // The same of equal problems.
  constexpr uint64_t mix() const {
    return static_cast<uint64_t>(M * 31 + K * 7 + N * 5 + R * 3 + static_cast<int>(activation) * 2 + training +
                                 residual * 11 + gate_R * 13 + pivoted * 17);
  }

  constexpr Form form() const {
    if (gate_R) return pivoted ? Form::gated_pivoted : Form::gated;
    return pivoted ? Form::pivoted : Form::plain;
  }
  constexpr int64_t up_rows() const { return pivoted ? N - R : N; }  // of the value
  constexpr int64_t up_numbers() const { return up_rows() * R + (pivoted ? N - gate_R : N) * gate_R; }

  // Of factors, and their ranks: both together, and the larger.
  constexpr int pairs() const { return pairs_of(form()); }
  constexpr int64_t ranks() const { return R + gate_R; }
  constexpr int64_t most_rank() const { return R < gate_R ? gate_R : R; }

  // As the matrix kernels have it: those of gated layers know no places, and get an up of all rows.
  constexpr LinearProblem on_all_rows() const {
    LinearProblem all = *this;
    all.pivoted = pivoted && !gate_R;
    return all;
  }

  // The layers that gate and value would be alone.
  constexpr LinearProblem gate() const {
    LinearProblem alone = *this;
    alone.R = gate_R;
    alone.gate_R = 0;
    return alone;
  }
  constexpr LinearProblem value() const {
    LinearProblem alone = *this;
    alone.gate_R = 0;
    alone.activation = Activation::none;
    return alone;
  }
};

}  // namespace shrank
